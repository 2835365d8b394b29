"""The list of long tests (tests/long.toml): each entry names tests that exist, and leaves them out unless they are asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from long_tests import Entry, long_tests
from parity.conftest import collect_ignore_glob

ROOT = Path(__file__).parents[1]


def collected(*arguments: str) -> set[str]:
    """The ids of the tests that pytest would run."""
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)
    assert done.returncode in (0, 5), done.stdout + done.stderr
    return {line for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line}


def file_of(entry: Entry) -> str:
    return entry.tests.partition("::")[0]


def left_out(file: str) -> bool:
    """True for a file of tests/parity whose library is not installed; pytest would import a file that is named all the same."""
    return file.startswith("tests/parity/") and any(Path(file).match(pattern) for pattern in collect_ignore_glob)


@pytest.fixture(scope="module")
def files() -> list[str]:
    return sorted({file_of(entry) for entry in long_tests() if not left_out(file_of(entry))})


@pytest.fixture(scope="module")
def every(files: list[str]) -> set[str]:
    return collected("--all", *files)


@pytest.mark.parametrize("entry", long_tests(), ids=lambda entry: entry.tests.rpartition("/")[2])
def test_an_entry_names_tests_that_exist_and_says_why_they_are_long(entry: Entry, every: set[str]) -> None:
    if left_out(file_of(entry)):
        assert (ROOT / file_of(entry)).is_file()
    else:
        assert any(entry.names(node_id) for node_id in every)
    assert entry.reason and entry.seconds > 0


def test_listed_tests_are_left_out_and_all_others_run(files: list[str], every: set[str]) -> None:
    assert collected(*files) == {node_id for node_id in every if not any(entry.names(node_id) for entry in long_tests())}


def test_a_long_test_that_is_named_runs_without_all(every: set[str]) -> None:
    one = next(node_id for node_id in sorted(every) if long_tests()[0].names(node_id)).partition("[")[0]
    assert {node_id.partition("[")[0] for node_id in collected(one)} == {one}
