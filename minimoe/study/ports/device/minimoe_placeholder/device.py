"""The device: what compiles a kernel, launches it, waits for it, and says how much memory is free.

The processor stands in for your device, and Numba for its compiler, so that everything here works from the first minute. Replace each
function by your device's; the comments say with what. `kernels.py` has the sources, `__init__.py` the array layer.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np


class DeviceError(Exception):
    """A kernel that cannot be compiled, or a launch with arrays that it does not take."""


@cache
def compiled(source: str, name: str) -> Callable[..., None]:
    """Compile the function `name` of a source, once in a process: the cache's key is the source itself.

    Replace Numba by your compiler, and keep what it makes on disk, by a hash of the source, the compiler's version and the device's.
    """
    functions: dict[str, Any] = {"exp": math.exp}  # what a source may call
    try:
        exec(compile(source, f"<{name}>", "exec"), functions)
        return numba.njit(nogil=True)(functions[name])
    except Exception as error:
        raise DeviceError(f"{name} does not compile: {type(error).__name__}: {error}") from error


def launch(source: str, name: str, blocks: int, *arguments: Any) -> None:
    """Run a kernel for each block of a grid. Arrays must be contiguous: a kernel sees an address, and no strides.

    Replace the loop by a launch on your device's queue, which returns before the kernel has run.
    """
    kernel = compiled(source, name)
    for place, argument in enumerate(arguments):
        if isinstance(argument, np.ndarray) and not argument.flags.c_contiguous:
            raise DeviceError(f"{name}: argument {place}, of shape {list(argument.shape)}, is not contiguous")
    for block in range(blocks):
        kernel(block, *arguments)


def synchronize() -> None:
    """Wait until the device's queue is empty. A launch here returns when it is done: replace this by your device's wait."""


def captured(work: Callable[[], None]) -> Callable[[], None]:
    """Run `work` once, and return a function that repeats what it launched, on the same addresses.

    Replace it by your device's graph: begin a capture on the queue, call work(), end the capture, and return the graph's launch.
    Nothing may be allocated, and nothing read on the host, while work() is captured. The processor repeats the work itself.
    """
    work()
    return work


def shortage(error: BaseException) -> tuple[int, int] | None:
    """Return (bytes asked for, bytes free) if an error says that memory is short, else None. Replace NumPy's error by your device's."""
    if not isinstance(error, MemoryError):
        return None
    shape, dtype = getattr(error, "shape", (0,)), np.dtype(getattr(error, "dtype", np.uint8))
    return math.prod(shape) * dtype.itemsize, 0  # NumPy does not say how much is free
