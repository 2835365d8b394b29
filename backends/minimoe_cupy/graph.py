"""A step as a CUDA graph: its kernels recorded once, with the memory that they use kept for them, and launched as a whole from then on."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import cupy


class Refused(Exception):
    """What a graph would repeat wrongly; the message says what."""


def capturing() -> bool:
    """Is the current stream being recorded?"""
    return bool(cupy.cuda.get_current_stream().is_capturing())


def refuse_while_capturing(what: str) -> None:
    """Raise Refused for what a graph would repeat wrongly, such as a copy from memory of the host that is gone by then."""
    if capturing():
        raise Refused(what)


def record(work: Callable[[], None], say: Callable[[str], None]) -> Callable[[], None] | None:
    """Run `work`, and give what launches the graph of all that it asks of the device. Where there is none: None, after `say` heard why.

    Its arrays come from a pool of their own, which lives as long as the graph: nothing else is ever put where the graph writes. While a
    step is recorded the device does nothing, so a step that cannot be is simply done again.
    """
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    cupy.cuda.get_current_stream().synchronize()
    cupy.get_default_memory_pool().free_all_blocks()  # what the steps before have left: the recording's pool needs as much
    graph, why = _capture(work, stream, pool)
    if graph is None:
        pool.free_all_blocks()
        say(why)
        work()
        return None

    def again(kept: object = pool) -> None:
        graph.launch(cupy.cuda.get_current_stream())

    again()
    return again


def _capture(work: Callable[[], None], stream: cupy.cuda.Stream, pool: cupy.cuda.MemoryPool) -> tuple[Any, str]:
    """-> the graph, or None and why there is none; then nothing of the attempt is left"""
    with stream, cupy.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        try:
            work()
            return stream.end_capture(), ""
        except Exception as error:
            with suppress(cupy.cuda.runtime.CUDARuntimeError):  # what went wrong may have ended it already
                stream.end_capture()
            return None, str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
