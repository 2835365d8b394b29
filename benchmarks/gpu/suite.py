"""Are the kernels right on this card? tests/gpu by pytest, a process for each backend, and a small case under compute-sanitizer."""

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

from benchmarks.gpu.workers import Deadline

ROOT = Path(__file__).parents[2]
FOLDER = "tests/gpu"
CHOSEN = {"cupy": "not numba-cuda", "numba-cuda": "numba-cuda"}  # by pytest's -k: a test's parameter is the backend's name
OUTCOME = re.compile(rf"^({FOLDER}/.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.M)
REASON = re.compile(rf"^(?:FAILED|ERROR) ({FOLDER}/.+?) - (.*)$", re.M)
COLLECTED = re.compile(r"^collected (\d+) items?(?: / (\d+) deselected)?", re.M)
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")
LAST_WORDS = 8.0  # seconds that pytest has to tell of its failures once it is asked to stop
TOOLS = ("memcheck", "racecheck")


def suite(out: Path, deadline: Deadline) -> Iterator[tuple[str, Any]]:
    """What came of each, by name. They run at the same time: most of it is compiling on the host."""
    with ExitStack() as stack:
        running = [Job(f"tests-{name}", [*pytest_command(), "-k", words], out, stack) for name, words in CHOSEN.items()]
        program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        if program is None:
            yield "compute-sanitizer", {"left_out": "it is not here"}
        else:
            running += [Job(f"sanitizer-{tool}", sanitizer_command(program, tool), out, stack) for tool in TOOLS]
        for job in running:
            ended, text = job.finish(deadline)
            read = outcomes if job.name.startswith("tests") else errors
            yield job.name, {**read(text), "ended": ended, "seconds": job.seconds, "file": job.file.name}


class Job:
    """A process from the repository's root, its outputs in a file; when the stack unwinds it is no more."""

    def __init__(self, name: str, command: list[str], out: Path, stack: ExitStack) -> None:
        self.name, self.file, self.began = name, out / f"{name}.txt", time.monotonic()
        output = stack.enter_context(self.file.open("wb"))
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        stack.callback(self.kill)
        self.seconds = 0.0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def finish(self, deadline: Deadline) -> tuple[str, str]:
        """How it ended, and what it printed; where the time is up it is asked to stop, then made to."""
        try:
            ended = f"exit code {self.process.wait(deadline.left())}"
        except subprocess.TimeoutExpired:
            ended = "the time was up"
            self.process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(LAST_WORDS)
            self.kill()
        self.seconds = round(time.monotonic() - self.began, 1)
        return ended, self.file.read_text(encoding="utf-8", errors="replace")


def pytest_command() -> list[str]:
    return [
        sys.executable, "-u", "-m", "pytest", FOLDER, "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-v", "-rfE",
        "--tb=short", "--color=no",
    ]  # fmt: skip


def sanitizer_command(program: str, tool: str) -> list[str]:
    return [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu.small"]


def outcomes(text: str) -> dict[str, Any]:
    """From pytest's words: how many passed, which failed and why, how many were not reached."""
    found = dict(OUTCOME.findall(text))
    reasons = dict(REASON.findall(text))
    count = COLLECTED.search(text)
    chosen = int(count[1]) - int(count[2] or 0) if count else 0
    failed = [{"test": name, "error": reasons.get(name, outcome)} for name, outcome in found.items() if outcome in ("FAILED", "ERROR")]
    numbers = {word.lower(): sum(outcome == word for outcome in found.values()) for word in ("PASSED", "SKIPPED")}
    return {**numbers, "failed": failed, "not_reached": max(0, chosen - len(found))}


def errors(text: str) -> dict[str, Any]:
    """From compute-sanitizer's words: how many errors; None where it did not come to its summary."""
    summary = SUMMARY.search(text)
    return {"errors": int(summary[1]) if summary else None}
