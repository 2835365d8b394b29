"""What training needs around it: a backend and its threads, out-of-memory errors in one line, and signals that let a step finish."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from minimoe.backend import Backend, use_backend
from minimoe.errors import UserError


@contextmanager
def training_backend(backend: Backend, threads: int) -> Iterator[None]:
    """Compute on this backend with this many threads (0: unchanged), without warnings of overflow, since every step is checked."""
    with use_backend(backend), limited_threads(threads, backend), np.errstate(all="ignore"):
        yield


@contextmanager
def limited_threads(threads: int, backend: Backend) -> Iterator[None]:
    """Limit BLAS and the backend's own kernels to this many threads; 0 leaves them unchanged."""
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
    """Yield a list to which SIGINT and SIGTERM append their number, so a step can finish and be saved; a second SIGINT ends at once.

    `noted` is called in the handler of each signal that is noted.
    """
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        noted()

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, where Python allows no handlers
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
