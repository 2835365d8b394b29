"""Live parity runs where its peers are installed (extra `parity`); elsewhere these files are not collected, and the run says so."""

from importlib.util import find_spec

import pytest

MISSING = [name for name in ("torch", "transformers") if find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if MISSING:
        terminalreporter.write_line(f"tests/parity was left out: {' and '.join(MISSING)} not installed (pip install 'minimoe[parity]')")
