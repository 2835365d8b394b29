"""Runs conformance cases, and says of each how it ended. `check_here` runs them in this process, `watched.py` in one that it can end."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

from minimoe.backend import Backend, kernel_names, overridden
from minimoe.testing.conformance import Case, ConformanceError

PASSED, FAILED, TIMEOUT, CRASHED = STATUSES = ("passed", "failed", "timeout", "crashed")
LONGEST = 4000  # characters of an error's text that are kept


@dataclass(frozen=True)
class Listed:
    """A case before it has run. `own`: its kernel is an override of the backend."""

    name: str
    level: str
    kernel: str
    own: bool

    def __str__(self) -> str:
        return f"{self.level}: {self.name}"


@dataclass(frozen=True)
class Result:
    """How a case ended. `status` is one of `STATUSES`; `message` says what is wrong, and is empty if it passed."""

    case: Listed
    status: str
    seconds: float
    message: str


def check_here(backend: Backend, chosen: list[Case], first: int = 0) -> Iterator[tuple[int, Result | None]]:
    """Run the cases from number `first` on in this process.   -> (number, None) before each, and (number, result) after it"""
    for number in range(first, len(chosen)):
        yield number, None
        yield number, run_case(listed(backend, chosen[number]), chosen[number])


def listed(backend: Backend, case: Case) -> Listed:
    return Listed(case.name, case.level, case.kernel, case.kernel in kernel_names() and overridden(backend, case.kernel))


def run_case(case: Listed, run: Case) -> Result:
    """Run a case. Whatever it raises is its failure: the author of a new backend wants to read it."""
    began = time.perf_counter()
    try:
        run.run()
    except (Exception, SystemExit) as error:  # a library that calls sys.exit fails this case, and does not end the check
        return Result(case, FAILED, time.perf_counter() - began, _said(error))
    return Result(case, PASSED, time.perf_counter() - began, "")


def _said(error: BaseException) -> str:
    if os.environ.get("MINIMOE_DEBUG") == "1":
        traceback.print_exception(error)
    try:
        text = str(error)
    except Exception as second:
        text = f"its message raises {type(second).__name__}"
    text = text.encode("utf-8", "backslashreplace").decode()  # parts of file names that are not Unicode cannot be printed
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}... ({len(text)} characters)"
    if isinstance(error, ConformanceError) and error.__cause__ is None:
        return text
    raised = "" if isinstance(error, ConformanceError) else f"It raised {type(error).__name__}: "
    return f"{raised}{text} (MINIMOE_DEBUG=1 shows the traceback)"
