"""Processes that may crash, hang or lose the card, and one that measures problem after problem and is restarted when needed."""

import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gpu.ceilings import ceiling_problems
from benchmarks.gpu.dense import dense_problems
from benchmarks.gpu.lab import Lab, card, facts
from benchmarks.gpu.problems import Lost, Problem, Row, measure, said
from benchmarks.gpu.routed import routed_problems

START = 120.0  # seconds for a process to become ready
PATIENCE = 90.0  # seconds for one side of a problem, including compilation


class NoAnswer(Exception):
    """A process that ended, or was silent for too long; the text says which."""


class Failed(Exception):
    """A process said why it cannot continue."""


class Deadline:
    """A number of seconds from now on, within those of the whole run."""

    def __init__(self, seconds: float, whole: "Deadline | None" = None) -> None:
        self.end = time.monotonic() + seconds
        self.whole = self if whole is None else whole

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def share(self, part: float) -> "Deadline":
        """A deadline for a part of what is left."""
        return Deadline(part * self.left(), self.whole)

    def patience(self, seconds: float) -> float:
        """Return how long to wait for something that takes at most `seconds`, but never beyond the whole run."""
        return min(seconds, self.whole.left())


class Process:
    """`serve(*arguments, pipe)` in a process of its own, and a group of its own with all that it starts; what it prints goes to a file."""

    def __init__(self, log: Path, serve: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=into_log, args=(log, serve, *arguments, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, message: Any) -> None:
        """Send a value. Raises NoAnswer if the process has ended."""
        try:
            self.pipe.send(message)
        except OSError as error:
            raise NoAnswer(self._ended()) from error

    def answer(self, patience: float) -> tuple[str, Any]:
        """The next pair of word and value. Raises NoAnswer, or Failed if the word is "failed"."""
        try:
            if not self.pipe.poll(patience):
                raise NoAnswer(f"no answer in {patience:.0f} s")
            word, value = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise NoAnswer(self._ended()) from error
        if word == "failed":
            raise Failed(value)
        return word, value

    def stop(self, patience: float = 1.0) -> None:
        """End the process and everything that it started."""
        with suppress(OSError):
            self.pipe.send(None)
        self.process.join(patience)
        if self.process.pid is not None:
            signal_group(self.process.pid, signal.SIGKILL)
        self.process.kill()  # if it has no group yet
        self.process.join()
        self.pipe.close()

    def _ended(self) -> str:
        self.process.join(5)
        return f"its process ended ({self.process.exitcode})"


def signal_group(leader: int, number: int) -> None:
    """Send a signal to a process group, if it still exists."""
    with suppress(ProcessLookupError):
        os.killpg(leader, number)


def into_log(log: Path, serve: Callable[..., None], *arguments: Any) -> None:
    """Lead a new group, append both outputs to a file, then serve; an error is the last answer."""
    os.setsid()
    sys.stdout.flush()
    with log.open("ab") as file:
        for output in (1, 2):
            os.dup2(file.fileno(), output)
    pipe: Connection = arguments[-1]
    try:
        serve(*arguments)
    except Exception as error:  # of any library: it becomes the text of a row or of a part
        with suppress(OSError):
            pipe.send(("failed", said(error)))
        raise


# ---- problems ------------------------------------------------------------------------------------------------------------------------


def kernel_problems(scale: str) -> list[Problem]:
    """Problems with a target first, then every kernel's first size, its second, ...: the last are left out if time does not suffice."""
    seen: Counter[str] = Counter()
    ranked = []
    for problem in (*routed_problems(scale), *dense_problems(scale)):
        ranked.append((not problem.goal, seen[problem.kernel], problem))
        seen[problem.kernel] += 1
    return [problem for *_, problem in sorted(ranked, key=lambda entry: entry[:2])]


def problems_of(part: str, scale: str) -> list[Problem]:
    """All problems in order, the same list in the process that asks and in the one that measures."""
    return list(ceiling_problems(scale)) if part == "ceilings" else kernel_problems(scale)


def serve_problems(part: str, scale: str, pipe: Connection) -> None:
    """Measure the problems that the pipe names by number; "ready" with the machine's facts comes first."""
    lab = card(scale)
    problems = problems_of(part, scale)
    pipe.send(("ready", facts(lab)))
    while (wanted := pipe.recv()) is not None:
        answer_with(lab, problems[wanted[0]], wanted[1], pipe)


def answer_with(lab: Lab, problem: Problem, without: list[str], pipe: Connection) -> None:
    """The rows of a problem, or those of the sides that lost the device."""
    try:
        rows = measure(lab, problem, without, lambda side: pipe.send(("at", side)))
    except Lost as lost:
        pipe.send(("lost", lost.rows))
        return
    lab.release()
    pipe.send(("rows", rows))


@dataclass
class Bench:
    """Measures the problems of a part in a process, which is restarted if it is gone. Raises Failed if it cannot start."""

    part: str
    scale: str
    log: Path
    deadline: Deadline
    process: Process | None = None

    def start(self) -> Any:
        """The machine's facts, as the process sees them."""
        self.process = Process(self.log, serve_problems, self.part, self.scale)
        try:
            return self.process.answer(self.deadline.patience(START))[1]
        except NoAnswer as error:
            self.stop()
            raise Failed(str(error)) from error

    def rows(self, index: int, problem: Problem) -> list[Row]:
        """Measure all sides; a side that ends the process is left out of the next try."""
        patience = min(PATIENCE, max(10.0, self.deadline.left()))
        found: list[Row] = []
        while True:
            side, word = "", "at"
            value: Any = ""
            try:
                if self.process is None:
                    self.start()
                assert self.process is not None
                self.process.send((index, [row["side"] for row in found]))
                while word == "at":
                    side = value
                    word, value = self.process.answer(self.deadline.patience(patience))
            except (NoAnswer, Failed) as error:
                self.stop()
                if not side:
                    raise Failed(str(error)) from error
                word, value = "lost", [{**problem.row(side), "failed": str(error)}]
            found += value
            if word == "rows":
                return found
            self.stop()

    def stop(self) -> None:
        if self.process is not None:
            self.process.stop()
            self.process = None


def measured(part: str, scale: str, deadline: Deadline, log: Path) -> Iterator[list[Row]]:
    """The rows of a part, problem by problem; those for which there was no time say so."""
    bench = Bench(part, scale, log, deadline)
    try:
        for index, problem in enumerate(problems_of(part, scale)):
            if deadline.left():
                yield bench.rows(index, problem)
            else:
                yield [{**problem.row("all"), "left_out": "the time was up"}]
    finally:
        bench.stop()


def machine_facts(scale: str, deadline: Deadline, log: Path) -> Any:
    """Facts about the card, from a process that sees it. Raises Failed if there is none."""
    bench = Bench("ceilings", scale, log, deadline)
    try:
        return bench.start()
    finally:
        bench.stop()
