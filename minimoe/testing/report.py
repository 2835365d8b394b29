"""Runs the conformance suite for `minimoe backends check`: progress, what failed, and what to do about it."""

from __future__ import annotations

import json
import os
import shlex
import textwrap
import traceback

from minimoe import backend as backends
from minimoe.testing.cases import cases
from minimoe.testing.conformance import Case, ConformanceError

Failures = list[tuple[Case, str]]


def check_backend(name: str, kernel: str | None, as_json: bool) -> int:
    """Run all cases, or those of a kernel or a part of the array layer; return the exit code: 0 if all pass, else 1."""
    from rich.console import Console
    from rich.progress import track

    backend = backends.load(name)
    chosen = cases(backend, kernel=kernel)
    failed: Failures = []
    for level in dict.fromkeys(case.level for case in chosen):
        group = [case for case in chosen if case.level == level]
        for case in track(group, description=f"{name}: {level}", console=Console(stderr=True), disable=as_json):
            try:
                case.run()
            except Exception as error:  # the author of a new backend wants to read whatever it raises
                failed.append((case, _said(error)))
    if as_json:
        print(json.dumps({"backend": name, "cases": len(chosen), "failed": {str(case): text for case, text in failed}}))
        return 1 if failed else 0
    if failed:
        _show(name, backend, failed)
    conforms = "" if failed else ": it conforms" if kernel is None else f": it conforms in {kernel}"
    print(f"{name}: {len(chosen) - len(failed)} passed, {len(failed)} failed{conforms}")
    return 1 if failed else 0


def _said(error: Exception) -> str:
    if os.environ.get("MINIMOE_DEBUG") == "1":
        traceback.print_exception(error)
    if isinstance(error, ConformanceError) and error.__cause__ is None:
        return str(error)
    text = str(error) if isinstance(error, ConformanceError) else f"It raised {type(error).__name__}: {error}"
    return f"{text} (MINIMOE_DEBUG=1 shows the traceback)"


def _show(name: str, backend: backends.Backend, failed: Failures) -> None:
    """Print the failures of the lowest level (only the backend's own kernels if any of them failed), and the names of the others."""
    lowest = [pair for pair in failed if pair[0].level == failed[0][0].level]
    shown = [pair for pair in lowest if _its_own(backend, pair[0].kernel)] or lowest
    for case, text in shown:
        wrapped = textwrap.fill(text, 140, initial_indent="  ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        print(f"FAILED {case.name}, level {case.level}\n{wrapped}\n")
    rest: dict[str, dict[str, None]] = {}
    for pair in failed:
        if pair not in shown:
            rest.setdefault(pair[0].level, {})[pair[0].kernel] = None
    if rest:
        levels = "; ".join(f"{level}: {', '.join(kernels)}" for level, kernels in rest.items())
        print(f"Failed too, and may pass when {'this does' if len(shown) == 1 else 'these do'}: {levels}\n")
    first = shown[0][0].kernel
    print(f"Fix {first} first, then check again: minimoe backends check {name} --kernel {shlex.quote(first)}")


def _its_own(backend: backends.Backend, kernel: str) -> bool:
    return kernel in backends.kernel_names() and backends.overridden(backend, kernel)
