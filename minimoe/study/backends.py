"""What `minimoe backends` shows: the backends that are available here, and their kernels."""

from __future__ import annotations

from typing import Any

from minimoe.study.tables import Rows


def backends_report() -> dict[str, dict[str, Any]]:
    """Return for every known backend whether it runs here and why not, its dtypes, the kind of each kernel, and its own helpers."""
    from minimoe.backend import available, describe

    report = {}
    for name in available():
        about = describe(name)
        report[name] = {
            "available": about.available, "why_not": about.why_not, "dtypes": list(about.dtypes), "kernels": about.kernels,
            "proven": about.proven, "helpers": about.helpers, "emulated": about.emulated,
        }  # fmt: skip
    return report


def show_backends() -> None:
    """Print the report as a table, with a line for each backend that does not run here and for its own kernels."""
    import platform

    import minimoe
    from minimoe.backend import CONTRACT, load
    from minimoe.runs.environment import environment
    from minimoe.study.tables import console, show, wrapped

    facts, report = environment(), backends_report()
    versions = f"minimoe {minimoe.__version__}, contract {CONTRACT}, Python {platform.python_version()}, numpy {facts['numpy']}"
    show(f"{versions}, {facts['platform']}")
    show(backends_table(report))
    for name, about in report.items():
        if not about["available"]:
            show(_why_not(name, about))
        for label, kernels in _own_kernels(about).items():
            show(wrapped(f"{name}, {label}: {', '.join(kernels)}", console().width))
    show(f"auto selects {load('auto').name}; `minimoe backends check NAME` runs the conformance suite; --json names every kernel")


def backends_table(report: dict[str, dict[str, Any]]) -> Rows:
    """Return a row for each backend, with the number of its kernels of each kind."""
    table = Rows(("backend", "here", "dtypes", "hand-written", "library", "reference"), left=3)
    for name, about in report.items():
        kinds = list(about["kernels"].values())
        here = "yes" if about["available"] else "no"
        table.add(name, here, ", ".join(about["dtypes"]), *(str(kinds.count(k)) for k in ("hand-written", "library", "reference")))
    return table


def _why_not(name: str, about: dict[str, Any]) -> str:
    """Return why a backend does not run here, and how many hand-written kernels it has."""
    why = about["why_not"].removeprefix("backend ")
    own = [kernel for kernel, kind in about["kernels"].items() if kind == "hand-written"]
    kernels = f"it has {len(own)} hand-written kernels, {sum(kernel not in about['proven'] for kernel in own)} of them unproven"
    if not own:
        kernels = "it has no hand-written kernel" if about["kernels"] else "its kernels are not known without it"
    return f"{why if why.startswith(name) else f'{name}: {why}'}; {kernels}"


def _own_kernels(about: dict[str, Any]) -> dict[str, list[str]]:
    """Return the kernels that are not references, by their kind and by where they ran; then the helpers, by their kind."""
    found: dict[str, list[str]] = {}
    for kernel, kind in about["kernels"].items():
        if kind != "reference":
            emulated = f"{about['emulated']}, " if about["emulated"] and kind == "hand-written" else ""
            proof = f"proven {about['proven'][kernel]}" if kernel in about["proven"] else "unproven on a card" if emulated else "unproven"
            found.setdefault(f"{kind}, {emulated}{proof}", []).append(kernel)
    for helper, kind in about["helpers"].items():
        found.setdefault(f"helpers of references, {kind}", []).append(helper)
    return found
