"""Setup for all tests: the backend they run on, the long tests that are left out, and the only skips that MINIMOE_STRICT_SKIPS allows."""

import os
import random
import signal
from collections.abc import Iterator
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; set before NumPy starts its threads
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings
from long_tests import long_tests

from minimoe.backend import use_backend

ALLOWED_SKIPS = ("needs a physical GPU", "MINIMOE_SHAKESPEARE is not set")
refused: list[str] = []
left_out: set[str] = set()

settings.register_profile("minimoe", deadline=None)  # how long an example takes says more about the machine than about the code
settings.load_profile("minimoe")


@pytest.fixture(autouse=True)
def on_numpy() -> Iterator[None]:
    """Run tests that name no backend on NumPy, whatever else is installed."""
    with use_backend("numpy"):
        yield


@pytest.fixture(autouse=True)
def signals_of_a_terminal() -> Iterator[None]:
    """Let signals act as in a terminal, however the tests were started: `nohup` and jobs in the background of a script ignore some."""
    usual = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_DFL, "SIGUSR1": signal.SIG_DFL}
    known = {getattr(signal, name): handler for name, handler in usual.items() if hasattr(signal, name)}
    before = {number: signal.signal(number, handler) for number, handler in known.items()}
    yield
    for number, given in before.items():
        signal.signal(number, given)


# ---- long tests --------------------------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the long tests of tests/long.toml too")


def pytest_configure(config: pytest.Config) -> None:
    """Draw the schedules in which the PTX machine runs kernels; worker processes find them in their environment."""
    others = [random.randrange(1, 2**31) for _ in range(4)] if config.getoption("--all") else []
    seeds = (random.randrange(1, 2**31, 2), *others)  # the first is odd: with it, products of wgmma read their operands at once
    os.environ.setdefault("MINIMOE_PTX_SEEDS", ",".join(map(str, seeds)))


def pytest_report_header() -> str:
    return f"PTX schedules: MINIMOE_PTX_SEEDS={os.environ['MINIMOE_PTX_SEEDS']}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long tests, unless --all is given or the command names them one by one; workers take slow files first."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = {file: -place for place, file in enumerate(reversed(SLOW), 1)}
        items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], 0))
    if config.getoption("--all"):
        return
    named = {argument for argument in config.args if "::" in argument}
    entries = long_tests()
    out = [item for item in items if any(entry.names(item.nodeid) for entry in entries)]
    out = [item for item in out if not any(item.nodeid.startswith(argument) for argument in named)]
    left_out.update(item.nodeid for item in out)
    if out:
        items[:] = [item for item in items if item.nodeid not in left_out]
        config.hook.pytest_deselected(items=out)
        if hasattr(config, "workeroutput"):
            config.workeroutput["left out"] = sorted(left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Add the tests that a worker of pytest-xdist has left out to the report."""
    left_out.update(getattr(node, "workeroutput", {}).get("left out", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if left_out:
        terminalreporter.line(f"long tests left out: {len(left_out)}, listed in tests/long.toml; --all runs them")


# ---- two processes -----------------------------------------------------------------------------------------------------------------------

# Files that take longest from a cold start, the longest first: begun last, one of them would keep one process busy and the other waiting.
SLOW = (
    "tests/testing/test_conformance.py",
    "tests/backends/test_cupy_backend.py",
    "tests/backends/test_numba_cuda_backend.py",
    "tests/cli/test_cli.py",
    "tests/backends/test_cuda_compiles.py",
    "tests/layers/test_collapse.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2` give each process whole files, so that a file's compiled code, runs and fixtures are made once."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # else the files with the most tests come first
    return LoadFileScheduling(config, log)


# ---- skips -------------------------------------------------------------------------------------------------------------------------------


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if not any(allowed in reason for allowed in ALLOWED_SKIPS):
            refused.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if refused and os.environ.get("MINIMOE_STRICT_SKIPS"):
        print("\nskips that are not in tests/conftest.py's list:\n" + "\n".join(refused))
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
