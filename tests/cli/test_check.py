"""`minimoe backends check` on backends that hang, crash and print: each case has a result, and no process stays behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import environment, one_line

from minimoe.cli.checking import Progress, shortened
from minimoe.errors import UserError
from minimoe.testing.report import Report
from minimoe.testing.results import Listed, Result
from minimoe.testing.watched import check_watched

TOY = """
import ctypes, os, sys, time
from pathlib import Path
from minimoe_numpy import NumpyBackend

class Silent(Exception):
    def __str__(self):
        raise RuntimeError

DO = {
    "sleep": lambda: time.sleep(600),
    "native": lambda: ctypes.PyDLL(None).sleep(600),  # holds the interpreter's lock
    "segfault": lambda: ctypes.string_at(0),
    "exit": lambda: (print("no such device", file=sys.stderr, flush=True), os._exit(7)),
    "raise": lambda: 1 / 0,
    "sys.exit": lambda: sys.exit(0),
    "silent": lambda: (_ for _ in ()).throw(Silent()),
    "surrogate": lambda: (_ for _ in ()).throw(ValueError("no file \\udcff")),
    "long": lambda: (_ for _ in ()).throw(ValueError("x" * 10**7)),
    "noise": lambda: (print("{1: noise}"), os.write(1, b"native noise\\n"), print(f"options {sys.warnoptions}")),
}

class Toy(NumpyBackend):
    name = "toy"

    def relu(self, x, out=None):
        if str(x.dtype) == "float32":
            Path("pid").write_text(str(os.getpid()))
            DO[os.environ["TOY"]]()
        return super().relu(x, out)

def backend():
    if os.environ["TOY"] == "at load":
        DO["segfault"]()
    return Toy()
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the backend `toy`, as pip would install it."""
    folder = tmp_path_factory.mktemp("site")
    about = folder / "toy-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[minimoe.backends]\ntoy = toy:backend\n")
    (folder / "toy.py").write_text(TOY)
    return folder


def start(site: Path, folder: Path, does: str, *options: str, flags: tuple[str, ...] = (), **more: str) -> "subprocess.Popen[str]":
    env = environment(TOY=does, **more)
    env["PYTHONPATH"] = f"{site}{os.pathsep}{env['PYTHONPATH']}"
    command = [sys.executable, *flags, "-m", "minimoe", "backends", "check", "toy", "--kernel", "relu", *options]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def check(site: Path, folder: Path, does: str, *options: str, **more: Any) -> tuple[int, str, str]:
    process = start(site, folder, does, *options, **more)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def gone(folder: Path, patience: float = 10.0) -> bool:
    """Return True if the process that ran the cases has ended."""
    number, until = int((folder / "pid").read_text()), time.monotonic() + patience
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{number}/stat").read_text().split()[2] == "Z":  # its parent was killed, and nobody has asked for its end
                return True
            os.kill(number, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("does", ["sleep", "native"])
def test_a_case_that_hangs_is_named_and_the_others_run(site: Path, tmp_path: Path, does: str) -> None:
    code, out, err = check(site, tmp_path, does, "--level", "kernels", "--timeout", "1.5", "--json")
    found = json.loads(out)
    assert (code, err) == (1, "") and gone(tmp_path)
    statuses = {result["name"]: result["status"] for result in found["results"]}
    assert statuses["relu [float32]"] == "timeout" and statuses["relu [float64]"] == "passed"
    hung = next(result for result in found["results"] if result["name"] == "relu [float32]")
    assert "not done after 1.5 s" in hung["message"] and "relu (" in hung["message"] and "toy.py, line" in hung["message"]
    assert found["failed"]["kernels: relu [float32]"] == hung["message"] and hung["seconds"] == 1.5
    assert found["cases"] == len(found["results"]) == sum(found["summary"].values()) and found["summary"]["not_run"] == 0


@pytest.mark.parametrize(
    "does, says", [("segfault", "signal 11 (SIGSEGV), in string_at ("), ("exit", "exit code 7. It printed: no such device")]
)
def test_a_case_that_ends_the_process_is_named_and_the_others_run(site: Path, tmp_path: Path, does: str, says: str) -> None:
    code, out, _ = check(site, tmp_path, does, "--level", "kernels")
    assert code == 1 and "CRASHED relu [float32], level kernels\n" in out and says in " ".join(out.split())
    assert re.search(r"toy: 2 passed, 0 failed, 2 crashed in 0:\d\d$", out) and max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_prints_the_results_so_far_and_leaves_no_process(site: Path, tmp_path: Path, number: int, code: int) -> None:
    process = start(site, tmp_path, "native", "--json")
    while not (tmp_path / "pid").exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    found = json.loads(out)
    assert process.returncode == code and not found["conforms"] and found["summary"]["not_run"] == found["cases"] > 0
    assert f"{found['cases']} of {found['cases']} cases were not run" in one_line(err) and gone(tmp_path)


def test_a_check_that_is_killed_leaves_no_process_behind(site: Path, tmp_path: Path) -> None:
    process = start(site, tmp_path, "sleep")
    while not (tmp_path / "pid").exists():
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=60)
    assert gone(tmp_path)


def test_what_a_backend_prints_stays_out_of_json(site: Path, tmp_path: Path) -> None:
    code, out, err = check(site, tmp_path, "noise", "--json", flags=("-Wignore::ResourceWarning",))
    assert code == 0 and json.loads(out)["conforms"]
    assert "{1: noise}" in err and "native noise" in err and "ignore::ResourceWarning" in err


def test_the_traceback_of_a_failure_is_shown_if_it_is_asked_for(site: Path, tmp_path: Path) -> None:
    code, out, err = check(site, tmp_path, "raise", "--level", "kernels")
    assert code == 1 and "ZeroDivisionError" in out and "Traceback" not in err
    code, out, err = check(site, tmp_path, "raise", "--level", "kernels", MINIMOE_DEBUG="1")
    assert code == 1 and "Traceback" in err and "in relu" in err


@pytest.mark.parametrize(
    "does, says",
    [
        ("sys.exit", "It raised SystemExit: 0"),
        ("silent", "It raised RuntimeError"),
        ("surrogate", "no file \\udcff"),
        ("long", " characters)"),
    ],
)
@pytest.mark.parametrize("limit", ["0", "60"])
def test_an_odd_exception_fails_its_case_alone(site: Path, tmp_path: Path, does: str, says: str, limit: str) -> None:
    code, out, err = check(site, tmp_path, does, "--level", "kernels", "--timeout", limit, "--json")
    found = json.loads(out)
    assert (code, err) == (1, "") and len(out) < 30_000
    assert {result["name"]: result["status"] for result in found["results"]}["relu [float64]"] == "passed"
    assert says in found["failed"]["kernels: relu [float32]"]
    code, out, err = check(site, tmp_path, does, "--level", "kernels", "--timeout", limit)
    assert (code, err) == (1, "") and "FAILED relu [float32]" in out


def test_a_backend_that_ends_the_process_while_it_is_loaded_is_a_mistake_in_one_line(site: Path, tmp_path: Path) -> None:
    code, out, err = check(site, tmp_path, "at load")
    assert (code, out) == (2, "") and "signal 11 (SIGSEGV), in string_at" in one_line(err)


def test_a_level_that_does_not_exist_is_a_mistake() -> None:
    with pytest.raises(UserError, match="no conformance level 'kernel'"):
        list(check_watched("numpy", {"level": "kernel"}, 60.0))


def test_the_line_of_progress_fits_and_names_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("minimoe.cli.checking.now", lambda: clock[0])
    progress = Progress("numba", shown=True)
    assert progress.text() == "numba  0:00  loading"
    progress.begin(1, [Listed("a", "kernels", "a", False), Listed("attention_backward [float32]", "kernels", "attention_backward", True)])
    clock[0] += 5
    progress.bad = 3
    assert progress.text() == "numba  0:05  2/2  3 failed  kernels: attention_backward [float32]  5 s"
    assert len(shortened("x" * 200, 79)) == 79 and shortened("short", 79) == "short"


def test_a_report_counts_what_has_not_run() -> None:
    listed = [Listed(f"k{i}", "kernels", "k", False) for i in range(3)]
    report = Report("toy", {}, listed, [Result(listed[0], "passed", 1.0, "")], 61.0)
    assert report.text() == "toy: 1 passed, 0 failed, 2 not run in 1:01" and not report.conforms
