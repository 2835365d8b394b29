"""A process for each side of a benchmark, which waits on a pipe for its turn: while one side is measured, no other runs."""

import math
import multiprocessing
import resource
import statistics
import sys
import time
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console
from threadpoolctl import threadpool_limits

from benchmarks.models import Case
from benchmarks.peers import Side

QUIET = 0.05  # seconds before each turn
TURN = 0.25  # seconds of a turn if steps are short
MOST = 20  # steps per turn
WARM_UP, WARM_UP_COMPILED = 3, 10  # untimed steps after the first; compilers see new shapes for some steps


# ---- in a side's process -------------------------------------------------------------------------------------------------------


def serve(side: Side, case: Case, threads: int, pipe: Connection) -> None:
    """Make the step, then do as many as the pipe asks for, until it asks for 0. Answers with times, loss and memory, or an error."""
    try:
        for library in side.libraries:
            import_module(library)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
        before = memory("VmRSS")
        with threadpool_limits(limits=threads):
            step = side.make(case, *side.arguments)
            while count := pipe.recv():
                times, loss = timed(step, count)
                pipe.send({"times": times, "loss": loss, "peak": memory("VmHWM"), "before": before})
    except Exception as error:  # of any library: it becomes the row's text
        pipe.send({"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


def timed(step: Any, count: int) -> tuple[list[float], float]:
    """Seconds of each step, and the loss of the last."""
    times, loss = [], math.nan
    for _ in range(count):
        began = time.perf_counter()
        loss = step()
        times.append(time.perf_counter() - began)
    return times, loss


def memory(field: str) -> int:
    """Bytes that this process holds (VmRSS) or held at most (VmHWM); on systems without /proc, the most it held."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---- in the process that asks --------------------------------------------------------------------------------------------------


class Worker:
    """A side in its own process, which waits on a pipe until it is asked."""

    def __init__(self, side: Side, case: Case, threads: int, patience: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.kind, self.patience = side.kind, patience
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=serve, args=(side, case, threads, theirs), daemon=True)
        self.began = time.perf_counter()
        self.process.start()
        theirs.close()
        self.times: list[float] = []
        self.first = self.ready = self.loss = math.nan
        self.peak = self.before = 0
        self.failed = ""

    def take(self, count: int) -> list[float]:
        """Let the side do `count` steps.   -> their seconds; none from a side that failed or did not answer in time"""
        if self.failed:
            return []
        time.sleep(QUIET)
        try:
            self.pipe.send(count)
            answer: dict[str, Any] = (
                self.pipe.recv() if self.pipe.poll(self.patience) else {"failed": f"no answer in {self.patience:.0f} s"}
            )
        except (EOFError, OSError):
            self.process.join(5)
            answer = {"failed": f"its process ended ({self.process.exitcode})"}
        if "failed" in answer:
            self.failed = answer["failed"]
            self.stop()
            return []
        self.loss, self.peak, self.before = answer["loss"], answer["peak"], answer["before"]
        times: list[float] = answer["times"]
        return times

    def warm_up(self) -> None:
        """Do the first step, which is reported separately, and the untimed ones."""
        first = self.take(1)
        if first:
            self.first, self.ready = first[0], time.perf_counter() - self.began
            self.times = self.take(WARM_UP_COMPILED if self.kind == "compiled" else WARM_UP)

    def stop(self) -> None:
        """End the process; kill it if it is busy."""
        with suppress(OSError):
            self.pipe.send(0)
        self.process.join(0 if self.failed else 5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def row(self, tokens: int) -> dict[str, Any]:
        """A side's row in the JSON file."""
        if self.failed:
            return {"kind": self.kind, "failed": self.failed}
        median = statistics.median(self.times)
        milliseconds = {"first": self.first, "median": median, "fastest": min(self.times), "slowest": max(self.times)}
        return {
            "kind": self.kind,
            "ready_s": self.ready,
            **{f"{name}_ms": seconds * 1e3 for name, seconds in milliseconds.items()},
            "steps": len(self.times),
            "tokens_per_s": tokens / median,
            "loss": None if math.isnan(self.loss) else self.loss,
            "peak_mb": self.peak / 1e6,
            "peak_less_libraries_mb": (self.peak - self.before) / 1e6,
        }


def measure(case: Case, chosen: dict[str, Side], rounds: int, threads: int, patience: float, console: Console) -> dict[str, Any]:
    """Measure all sides of one model in turns.   -> for each a row of figures, or why it has none"""
    workers: dict[str, Worker] = {}
    try:
        for name, side in chosen.items():
            workers[name] = worker = Worker(side, case, threads, patience)
            worker.warm_up()
            console.print(f"  {name}: " + (f"failed: {worker.failed}" if worker.failed else f"ready in {worker.ready:.1f} s"), markup=False)
        fastest = min((min(w.times) for w in workers.values() if w.times), default=TURN)
        count = 1 if fastest >= TURN else min(MOST, math.ceil(TURN / fastest))
        for worker in workers.values():
            worker.times = []
        for done in range(1, rounds + 1):
            for worker in workers.values():
                worker.times += worker.take(count + 1)[1:]
            medians = [f"{statistics.median(w.times) * 1e3:.1f}" for w in workers.values() if w.times]
            console.print(f"  round {done} of {rounds}: {' | '.join(medians)} ms", markup=False)
    finally:
        for worker in workers.values():
            worker.stop()
    return {name: worker.row(case.tokens) for name, worker in workers.items()}
