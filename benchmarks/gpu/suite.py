"""Checks the kernels on this card: tests/gpu by pytest, a process for each backend, and a small case under compute-sanitizer."""

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu.workers import Deadline, signal_group

ROOT = Path(__file__).parents[2]
FOLDER = "tests/gpu"
CHOSEN = {"cupy": "not numba-cuda", "numba-cuda": "numba-cuda"}  # for pytest's -k: a test's parameter is the backend's name
OUTCOME = re.compile(rf"^({FOLDER}/.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.M)
REASON = re.compile(rf"^(?:FAILED|ERROR) ({FOLDER}/.+?) - (.*)$", re.M)
COLLECTED = re.compile(r"^collected (\d+) items?(?: / (\d+) deselected)?", re.M)
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
LAST_LINE = "the small case is done"  # printed if nothing stopped it
LAST_WORDS = 8.0  # seconds that pytest has to report failures after it is asked to stop
OFTEN = 0.2  # seconds between checks for processes that ended
TIME_UP = "the time was up"
TOOLS = ("memcheck", "racecheck")


def suite(out: Path, deadline: Deadline) -> Iterator[tuple[str, Any]]:
    """Run all at the same time, since most of it is compiling on the host.   -> the outcome of each, by name"""
    with ExitStack() as stack:
        running = [Job(f"tests-{name}", [*pytest_command(), "-k", words], out, stack) for name, words in CHOSEN.items()]
        program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        if program is None:
            yield "compute-sanitizer", {"left_out": "it is not here"}
        else:
            running += [Job(f"sanitizer-{tool}", sanitizer_command(program, tool), out, stack) for tool in TOOLS]
        yield from ended(running, deadline)
        for job in running:
            job.interrupt()
        last = Deadline(deadline.patience(LAST_WORDS), deadline.whole)
        for job in running:
            with suppress(subprocess.TimeoutExpired):
                job.process.wait(last.left())
            job.kill()
            yield job.name, job.outcome(TIME_UP)


def ended(running: list["Job"], deadline: Deadline) -> Iterator[tuple[str, Any]]:
    """The outcome of those that end in time, as they end; they are removed from the list."""
    while running and deadline.left():
        for job in list(running):
            code = job.process.poll()
            if code is not None:
                running.remove(job)
                yield job.name, job.outcome(f"exit code {code}")
        time.sleep(min(OFTEN, deadline.left()))


class Job:
    """A process that leads its own group, with its output in a file; none of the group is left when the stack unwinds."""

    def __init__(self, name: str, command: list[str], out: Path, stack: ExitStack) -> None:
        self.name, self.file, self.began = name, out / f"{name}.txt", time.monotonic()
        output = stack.enter_context(self.file.open("wb"))
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=hear_interrupts
        )
        stack.callback(self.kill)

    def interrupt(self) -> None:
        """Ask the whole group to stop."""
        signal_group(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        signal_group(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def outcome(self, how: str) -> dict[str, Any]:
        """Report how it ended, and its output."""
        text = self.file.read_text(encoding="utf-8", errors="replace")
        read = outcomes if self.name.startswith("tests") else errors
        return {**read(text), "ended": how, "seconds": round(time.monotonic() - self.began, 1), "file": self.file.name}


def hear_interrupts() -> None:
    """Let a new process be interrupted, even if this one ignores interrupts, as a job in the background of a script does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def pytest_command() -> list[str]:
    return [
        sys.executable, "-u", "-m", "pytest", FOLDER, "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-v", "-rfE",
        "--tb=short", "--color=no",
    ]  # fmt: skip


def sanitizer_command(program: str, tool: str) -> list[str]:
    """The command of compute-sanitizer. Failed calls of the driver do not count: CuPy and Numba test features by trying."""
    options = ["--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
    return [program, *options, sys.executable, "-m", "benchmarks.gpu.small"]


# ---- what their words say ----------------------------------------------------------------------------------------------------------------


def outcomes(text: str) -> dict[str, Any]:
    """Read pytest's output: how many passed, which failed and why, how many were not reached."""
    found = dict(OUTCOME.findall(text))
    reasons = dict(REASON.findall(text))
    count = COLLECTED.search(text)
    chosen = int(count[1]) - int(count[2] or 0) if count else 0
    failed = [{"test": name, "error": reasons.get(name, outcome)} for name, outcome in found.items() if outcome in ("FAILED", "ERROR")]
    numbers = {word.lower(): sum(outcome == word for outcome in found.values()) for word in ("PASSED", "SKIPPED")}
    return {**numbers, "failed": failed, "not_reached": max(0, chosen - len(found))}


def errors(text: str) -> dict[str, Any]:
    """Read compute-sanitizer's output: how many errors or hazards (None without a summary), and whether the case ended."""
    summaries = [int(memory or races) for memory, races in SUMMARY.findall(text)]
    return {"errors": sum(summaries) if summaries else None, "complete": LAST_LINE in text.splitlines()}


def counts(outcome: dict[str, Any]) -> bool:
    """True if a sanitizer's result covers the whole case."""
    return bool(outcome["errors"] is not None and outcome["complete"] and outcome["ended"] == "exit code 0")


def is_failure(outcome: dict[str, Any]) -> bool:
    """True if something failed, other than that the time was up."""
    if "left_out" in outcome:
        return False
    late = outcome["ended"] == TIME_UP
    if "errors" in outcome:
        return bool(outcome["errors"]) or not (late or counts(outcome))
    return bool(outcome["failed"]) or not outcome["passed"] or not (late or outcome["ended"] in ("exit code 0", "exit code 1"))
