"""Records a step as a CUDA graph: its kernels are recorded once, keep the memory that they use, and are launched together from then on."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import cupy


class Refused(Exception):
    """Raised for an operation that a graph would repeat wrongly; the message names it."""


def capturing() -> bool:
    """Returns True if the current stream is being recorded."""
    return bool(cupy.cuda.get_current_stream().is_capturing())


def refuse_while_capturing(what: str) -> None:
    """Raises Refused for an operation that a graph would repeat wrongly, such as a copy from host memory that is freed by then."""
    if capturing():
        raise Refused(what)


def record(work: Callable[[], None], say: Callable[[str], None], memory: Callable[[], object]) -> Callable[[], None] | None:
    """Runs `work` and returns a function that launches the graph of its device work; if it cannot be recorded, tells `say` why: None.

    Its arrays come from a pool of their own, which lives as long as the graph, so nothing else is ever allocated where the graph writes.
    So does what `memory` returns after the recording: memory from elsewhere whose address the graph has, such as cuBLAS's workspace, which
    would otherwise be freed with the thread that recorded. A graph is launched on the device on which it was recorded.
    While a step is being recorded the device does nothing, so a step that cannot be recorded is simply run again.
    """
    device, stream, pool = cupy.cuda.Device(), cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    cupy.cuda.get_current_stream().synchronize()
    cupy.get_default_memory_pool().free_all_blocks()  # the memory of earlier steps: the recording's pool needs as much
    graph, why = _capture(work, stream, pool)
    if graph is None:
        pool.free_all_blocks()
        say(why)
        work()
        return None

    def again(kept: object = (pool, memory())) -> None:
        with device:
            graph.launch(cupy.cuda.get_current_stream())

    again()
    return again


def _capture(work: Callable[[], None], stream: cupy.cuda.Stream, pool: cupy.cuda.MemoryPool) -> tuple[Any, str]:
    """-> the graph; or None and the reason, with the stream as before"""
    with stream, cupy.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        try:
            work()
            return stream.end_capture(), ""
        except Exception as error:
            with suppress(cupy.cuda.runtime.CUDARuntimeError):  # the error may have ended the capture already
                stream.end_capture()
            return None, str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
