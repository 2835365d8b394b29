"""The threads and the matrix product, which all kernels of a process share."""

import os

from minimoe.machine import usable_processors
from minimoe_numba.blas import Blas, find_blas
from minimoe_numba.pool import Pool


class Machine:
    """Made on first use, and again after a fork, which threads do not survive."""

    def __init__(self) -> None:
        self.blas: Blas | None = find_blas()
        self.pool = Pool(default_threads())

    def use_threads(self, threads: int) -> None:
        """Set the number of threads; 0 means all."""
        threads = threads or default_threads()
        if threads != self.pool.threads:
            self.pool.close()
            self.pool = Pool(threads)


_machine: list[Machine] = []


def machine() -> Machine:
    """Return the machine of this process."""
    if not _machine:
        _machine.append(Machine())
    return _machine[0]


def _forget() -> None:
    _machine.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def default_threads() -> int:
    """Return OMP_NUM_THREADS if it is set, else the number of processors that this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given):
        return int(given)
    return usable_processors()
