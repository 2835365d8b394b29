"""What all tests share: the backend they run on, and the one list of skips that are allowed where MINIMOE_STRICT_SKIPS is set."""

import os
from collections.abc import Iterator

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; set before NumPy starts its threads
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from minimoe.backend import use_backend

ALLOWED_SKIPS = ("needs a physical GPU", "MINIMOE_SHAKESPEARE is not set")
refused: list[str] = []


@pytest.fixture(autouse=True)
def on_numpy() -> Iterator[None]:
    """Tests that name no backend run on NumPy, whatever else is installed."""
    with use_backend("numpy"):
        yield


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if not any(allowed in reason for allowed in ALLOWED_SKIPS):
            refused.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if refused and os.environ.get("MINIMOE_STRICT_SKIPS"):
        print("\nskips that are not in tests/conftest.py's list:\n" + "\n".join(refused))
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
