"""Threads that share out the rows of a kernel: the caller, and one worker for each further core. All of it is machine code.

A job is a C function `job(start, stop, arguments)`, compiled by Numba. `Pool.run` cuts 0 .. n into pieces of `grain`, and every thread
takes the next piece until none is left. No two pieces write the same memory, so results do not depend on which thread takes a piece.

A worker is a Python thread inside a compiled function, where it does not hold the GIL. It watches a counter, so that starting a job costs
one or two microseconds (`python -m benchmarks.dispatch`; Python's locks take tens), and sleeps after a few milliseconds without work.
"""

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, types

from minimoe_numba.compiling import Functions, function_of, inlined
from minimoe_numba.native import call_job, fetch_add, load, pause, pointer, store, yield_core

PIECES, SIZE, GRAIN, JOB, ARGUMENTS, DONE, QUIT = range(0, 7 * 64, 64)  # offsets in bytes: each word has a cache line of its own
BITS = 32
NEXT = (1 << BITS) - 1  # PIECES holds the next piece in its lower bits, and the number of pieces above them
WATCH = 100_000  # looks at the counter before a worker sleeps: a few milliseconds
PATIENCE = 2_000  # looks before it offers the core to others


@inlined
def work(control, word):  # type: ignore[no-untyped-def]
    """Take pieces until none is left. The caller of `run` waits for every piece taken, so the job's arguments stay alive."""
    while word & NEXT < word >> BITS:
        word = fetch_add(control + PIECES, 1)
        piece = word & NEXT
        if piece < word >> BITS:
            grain = load(control + GRAIN)
            start = piece * grain
            call_job(load(control + JOB), start, min(start + grain, load(control + SIZE)), load(control + ARGUMENTS))
            fetch_add(control + DONE, 1)


@inlined
def offer(control, job, n, grain, arguments):  # type: ignore[no-untyped-def]
    """Offer a job to the workers, join in, and wait until the last piece is done. If `control` is 0, do all pieces alone."""
    pieces = (n + grain - 1) // grain
    if not control or pieces == 1:
        for start in range(0, n, grain):
            call_job(job, start, min(start + grain, n), arguments)
        return
    store(control + SIZE, n)
    store(control + GRAIN, grain)
    store(control + JOB, job)
    store(control + ARGUMENTS, arguments)
    store(control + DONE, 0)
    store(control + PIECES, pieces << BITS)
    work(control, pieces << BITS)
    looks = 0
    while load(control + DONE) < pieces:
        pause()
        looks += 1
        if looks > PATIENCE:
            yield_core()


def run_job(control, job, n, grain, arguments):  # type: ignore[no-untyped-def]
    offer(control, job, n, grain, arguments)


def run_jobs(control, table, count):  # type: ignore[no-untyped-def]
    """Run jobs one after the other. Each row of the table has job, n, grain and arguments."""
    rows = carray(pointer(table, np.int64), (count, 4))
    for i in range(count):
        offer(control, rows[i, 0], rows[i, 1], rows[i, 2], rows[i, 3])


def watch_for_work(control, looks):  # type: ignore[no-untyped-def]
    """Do the work that is offered, until `looks` looks in a row found none.   -> False if the pool closes"""
    idle = 0
    while idle < looks:
        word = load(control + PIECES)
        if word & NEXT < word >> BITS:
            work(control, word)
            idle = 0
        if load(control + QUIT):
            return False
        pause()
        idle += 1
        if idle > PATIENCE:
            yield_core()
    return True


PARTS: list[tuple[Callable[..., Any], Any]] = [
    (run_job, types.void(*[types.int64] * 5)),
    (run_jobs, types.void(*[types.int64] * 3)),
    (watch_for_work, types.boolean(*[types.int64] * 2)),
]


def compile_parts() -> tuple[Callable[..., Any], ...]:
    """Compile `run_job`, `run_jobs` and `watch_for_work`, which run without the GIL."""
    return tuple(function_of(function, signature, nogil=True) for function, signature in PARTS)


machine_code = Functions("pool", PARTS, compile_parts)


class Worker(threading.Thread):
    """A thread that watches a pool's counter, or sleeps."""

    def __init__(self, control: int) -> None:
        super().__init__(daemon=True, name="minimoe_numba worker")
        self.control, self.asleep, self.bell = control, False, threading.Lock()
        self.bell.acquire()
        self.start()

    def run(self) -> None:
        _, _, watch = machine_code()
        while watch(self.control, WATCH):
            self.asleep = True
            self.bell.acquire()

    def wake(self) -> None:
        self.asleep = False
        self.bell.release()


class Pool:
    """The threads of one process. `threads` includes the caller."""

    def __init__(self, threads: int) -> None:
        self.memory = np.zeros(8 * 64, dtype=np.int64)
        self.control = -(-self.memory.ctypes.data // 64) * 64
        self.share, self.share_all, _ = machine_code()
        self.busy = threading.Lock()  # one job at a time: another Python thread with a job meanwhile does it alone
        self.threads, self.workers = threads, [Worker(self.control) for _ in range(threads - 1)]

    def run(self, job: int, n: int, grain: int, arguments: int) -> None:
        """Call job(start, stop, arguments) for all pieces of 0 .. n."""
        if n <= 0:
            return
        if grain >= n or not self.workers or not self.busy.acquire(blocking=False):
            self.share(0, job, n, grain, arguments)
            return
        try:
            self._wake()
            self.share(self.control, job, n, grain, arguments)
        finally:
            self.busy.release()

    def run_all(self, table: int, count: int) -> None:
        """Run each row of a table [count,4] of int64: job, n, grain, arguments. n is at least 1."""
        if not self.workers or not self.busy.acquire(blocking=False):
            self.share_all(0, table, count)
            return
        try:
            self._wake()
            self.share_all(self.control, table, count)
        finally:
            self.busy.release()

    def _wake(self) -> None:
        for worker in self.workers:
            if worker.asleep:
                worker.wake()

    def close(self) -> None:
        """End the workers, after their last job."""
        ctypes.c_int64.from_address(self.control + QUIT).value = 1
        for worker in self.workers:
            if worker.asleep:
                worker.wake()
            worker.join()
