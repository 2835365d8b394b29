"""Live parity runs where its peers are installed (extra `parity`), a port's tests where its library is (extra `ports`).

Elsewhere these files are not collected, and the run says so.
"""

import shutil
from importlib.util import find_spec

import pytest

from minimoe import backend as backends

MISSING = [name for name in ("torch", "transformers") if find_spec(name) is None]
PORTS = ("jax", "mlx", "tinygrad")  # besides torch, each named for its library
MISSING_PORTS = [name for name in PORTS if find_spec(name) is None]
if "tinygrad" not in MISSING_PORTS and shutil.which("clang") is None:  # the compiler of its CPU device
    MISSING_PORTS.append("tinygrad")
collect_ignore_glob = ["test_*.py"] if MISSING else [f"test_backend_{name}.py" for name in MISSING_PORTS]


@pytest.fixture
def installed(request, monkeypatch):
    """Install the port of the test's module (`PORT`) as `pip install examples/backend_NAME` does."""
    port = request.module.PORT
    monkeypatch.syspath_prepend(port.folder)
    monkeypatch.delenv(f"MINIMOE_{port.name.upper()}_DEVICE", raising=False)
    monkeypatch.setattr(backends, "entry_points", lambda group: port.entry_points())
    backends.made_once.cache_clear()
    yield
    backends.made_once.cache_clear()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if MISSING:
        terminalreporter.write_line(f"tests/parity was left out: {' and '.join(MISSING)} not installed (pip install 'minimoe[parity]')")
    elif MISSING_PORTS:
        how = "pip install 'minimoe[ports]'; tinygrad also needs the compiler clang"
        terminalreporter.write_line(f"ports were left out: no {' and no '.join(MISSING_PORTS)} here ({how})")
