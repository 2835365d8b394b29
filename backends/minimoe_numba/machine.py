"""What the kernels of one process share: the threads and the matrix product."""

import os

from minimoe_numba.blas import Blas, find_blas
from minimoe_numba.pool import Pool


class Machine:
    """Made on first use; after a fork anew, since threads do not survive one."""

    def __init__(self) -> None:
        self.blas: Blas | None = find_blas()
        self.pool = Pool(default_threads())

    def use_threads(self, threads: int) -> None:
        """So many threads from now on; 0: all."""
        threads = threads or default_threads()
        if threads != self.pool.threads:
            self.pool.close()
            self.pool = Pool(threads)


_machine: list[Machine] = []


def machine() -> Machine:
    """This process's."""
    if not _machine:
        _machine.append(Machine())
    return _machine[0]


def _forget() -> None:
    _machine.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def default_threads() -> int:
    """The processors that this process may use, or what OMP_NUM_THREADS says."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
