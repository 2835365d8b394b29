"""The cost of running half of a kernel on a second thread: minimoe_numba's pool beside Python's locks.

`python -m benchmarks.dispatch`. The same work is divided over two threads; figures are medians in microseconds per call. A lock wakes a
sleeping thread and passes the GIL to it; the pool's worker watches a counter without the GIL.
"""

import statistics
import threading
import time
from collections.abc import Callable

import numpy as np
from numba import njit
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from minimoe_numba.compiling import FAST
from minimoe_numba.kernel import F1, kernel
from minimoe_numba.machine import machine as kernel_machine

PASSES = 64  # over each element, so that the work stays in the core's cache


@kernel
def pooled(start: int, stop: int, x: F1) -> None:
    for i in range(start, stop):
        value = x[i]
        for _ in range(PASSES):
            value = value * np.float32(0.999) + np.float32(0.001)
        x[i] = value


plain = njit(nogil=True, error_model="numpy", fastmath=FAST)(pooled.function)


class Handed:
    """A Python thread that runs one half, woken by a lock."""

    def __init__(self) -> None:
        self.go, self.done = threading.Lock(), threading.Lock()
        self.go.acquire()
        self.done.acquire()
        self.half: tuple[int, int, np.ndarray] = (0, 0, np.zeros(1, np.float32))
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            self.go.acquire()
            plain(*self.half)
            self.done.release()

    def __call__(self, n: int, x: np.ndarray) -> None:
        self.half = (n // 2, n, x)
        self.go.release()
        plain(0, n // 2, x)
        self.done.acquire()


def microseconds(call: Callable[[], None], rounds: int = 300) -> float:
    times = []
    for _ in range(rounds + 10):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times[10:]) * 1e6


def main() -> None:
    console, x, handed = Console(), np.ones(2**20, np.float32), Handed()
    console.print(machine())
    kernel_machine().use_threads(2)
    table = Table("elements", "one thread", "pool, whole in one piece", "pool, two halves", "lock, two halves", title="microseconds a call")
    for n in (100, 1_000, 10_000, 100_000, 1_000_000):
        sides = (
            lambda n=n: plain(0, n, x), lambda n=n: pooled(n, n, x), lambda n=n: pooled(n, -(-n // 2), x), lambda n=n: handed(n, x)
        )  # fmt: skip
        table.add_row(f"{n:,}", *(f"{microseconds(side):.1f}" for side in sides))
    console.print(table)


if __name__ == "__main__":
    main()
