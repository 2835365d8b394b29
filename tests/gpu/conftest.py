"""Setup for tests on a card: both GPU backends, and memory that reveals missing writes and writes out of bounds.

Without a card every test here is skipped by name; whether there is one is asked of the driver, so CuPy is not imported for it.
"""

import ctypes
import sys
from collections.abc import Iterator
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import pytest
from gpu.guard import Guard

from benchmarks.gpu.lab import BACKENDS
from minimoe.backend import Backend, BackendUnavailable, load
from minimoe.testing import Case, cases

REASON = "needs a physical GPU"


@cache
def card_is_here() -> bool:
    """True if there is a card that the kernels run on, and CuPy for it."""
    if find_spec("cupy") is None:
        return False
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    from minimoe_cupy.device import check_device

    try:
        check_device("cupy")
    except BackendUnavailable:
        return False
    return True


def needs_card() -> pytest.MarkDecorator:
    return pytest.mark.skipif(not card_is_here(), reason=REASON)


def cases_of(name: str) -> list[Case]:
    """Return a backend's conformance cases, or one that fails if it cannot be loaded."""
    try:
        return cases(load(name))
    except Exception as error:
        return [Case("the backend loads", "loading", "", partial(reraise, error))]


def reraise(error: Exception) -> None:
    raise error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise `case` by every conformance case of both backends (without a card one of each, to be skipped), `backend` by both."""
    if "case" in metafunc.fixturenames:
        found = [(name, case) for name in BACKENDS for case in (cases_of(name) if card_is_here() else [None])]
        parameters = [pytest.param(case, id=name if case is None else f"{name}, {case}", marks=needs_card()) for name, case in found]
        metafunc.parametrize("case", parameters)
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", [pytest.param(name, id=name, marks=needs_card()) for name in BACKENDS], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    return load(request.param)


@pytest.fixture
def guarded() -> Iterator[Any]:
    """Fill all of CuPy's memory with NaN, between margins that must be intact at the end."""
    import cupy

    guard = Guard(cupy)
    with cupy.cuda.using_allocator(guard.malloc):
        yield guard
    guard.check()
