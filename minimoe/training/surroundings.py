"""What training needs around it: a backend and its threads, out-of-memory errors in one line, and signals that let a step finish."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from minimoe import machine
from minimoe.backend import Backend, use_backend
from minimoe.errors import UserError


@contextmanager
def training_backend(backend: Backend, threads: int) -> Iterator[None]:
    """Compute on this backend with this many threads (0: unchanged), without warnings of overflow, since every step is checked."""
    with use_backend(backend), limited_threads(threads, backend), np.errstate(all="ignore"):
        yield


@contextmanager
def limited_threads(threads: int, backend: Backend) -> Iterator[None]:
    """Limit BLAS and the backend's own kernels to this many threads; 0 leaves them unchanged, unless there are more than a quota allows."""
    threads = threads or quota_threads()
    if not threads:
        yield
        return
    from threadpoolctl import threadpool_limits

    backend.use_threads(threads)
    try:
        with threadpool_limits(limits=threads):
            yield
    finally:
        backend.use_threads(0)


def quota_threads() -> int:
    """Return how many threads a container's quota of processor time allows; 0 if all, or if the user has set their number."""
    if any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")):
        return 0
    count = machine.usable_processors()
    return count if count < machine.allowed_processors() else 0


@contextmanager
def explain_memory_errors(backend: Backend) -> Iterator[None]:
    """Turn the backend's out-of-memory error into a `UserError` with the bytes asked for and free, and the settings that need less."""
    try:
        yield
    except Exception as error:
        found = backend.out_of_memory(error)
        if found is None:
            raise
        asked, free = (f"{size / 1e6:,.0f} MB" for size in found)
        raise UserError(
            f"backend {backend.name}: out of memory: {asked} asked for, {free} free; less is needed with a smaller train.batch_size "
            '(and train.accumulate), with train.recompute = true, or with train.dtype = "bfloat16" if the backend has it'
        ) from error


@contextmanager
def stop_signals(noted: Callable[[], None]) -> Iterator[list[int]]:
    """Yield a list to which SIGINT, SIGTERM and SIGHUP append their number, so that a step can finish and be saved.

    A second SIGINT ends at once. `noted` is called in the handler of each signal that is noted.
    """
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        noted()

    with _handled(note, "SIGINT", "SIGTERM", "SIGHUP"):
        yield received


@contextmanager
def save_signals() -> Iterator[list[int]]:
    """Yield a list to which SIGUSR1 appends its number: a batch system sends it when the time is nearly up."""
    received: list[int] = []
    with _handled(lambda number, _: received.append(number), "SIGUSR1"):
        yield received


@contextmanager
def _handled(handler: Callable[[int, Any], None], *names: str) -> Iterator[None]:
    """Handle those of the signals that the system has and nobody else handles.

    One that is ignored stays ignored (`nohup`, a job in the background of a script). Where a program that calls minimoe handles SIGHUP or
    SIGUSR1 itself, it keeps them.
    """
    before: dict[int, Any] = {}
    try:
        for name in names:
            number = getattr(signal, name, None)  # Windows has neither SIGHUP nor SIGUSR1
            given = signal.SIG_IGN if number is None else signal.getsignal(number)
            free = given not in (signal.SIG_IGN, None) if name in ("SIGINT", "SIGTERM") else given is signal.SIG_DFL
            if number is not None and free and threading.current_thread() is threading.main_thread():  # Python allows it in no other
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, given in before.items():
            signal.signal(number, given)
