"""Launches kernels on a card: on the array library's stream, and without waiting for anything.

Numba accepts foreign arrays, but waits for the stream that they name, so a step could not be recorded as a CUDA graph. All launches here,
and CuPy's own work, are queued on one stream, in order, so there is nothing to wait for: arrays are passed to Numba without a stream.
"""

from collections.abc import Callable
from typing import Any

from minimoe.backend import Array


class Memory:
    """An array as Numba reads it: the CUDA Array Interface without `stream`."""

    __slots__ = ("__cuda_array_interface__",)

    def __init__(self, array: Array, address: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(array.shape), "typestr": array.dtype.str, "data": (address, False), "strides": None, "version": 3,
        }  # fmt: skip


class Launcher:
    """`run` of `CudaKernels` on a card: run(kernel)[grid, block, stream, shared_bytes](*args), compiled for those types on first use."""

    def __init__(self, spare: Array) -> None:
        self.spare = spare  # empty arrays get its address: they have none of their own, and Numba asks the driver about each

    def __call__(self, kernel: Any) -> "Configured":
        return Configured(self, kernel)

    def argument(self, value: Any) -> Any:
        """Returns the memory of a C-contiguous device array; returns a number unchanged."""
        if not hasattr(value, "data") or not hasattr(value.data, "ptr"):
            return value
        return Memory(value, value.data.ptr if value.size else self.spare.data.ptr)


class Configured:
    """A kernel that lacks its launch shape."""

    def __init__(self, launcher: Launcher, kernel: Any) -> None:
        self.launcher, self.kernel = launcher, kernel

    def __getitem__(self, shape: tuple[Any, ...]) -> Callable[..., None]:
        configured = self.kernel[shape]

        def launch(*args: Any) -> None:
            configured(*map(self.launcher.argument, args))

        return launch


def stream_at(address: int) -> Any:
    """Returns the stream at an address in the form that Numba takes; 0 is the default stream."""
    if not address:
        return 0
    from cuda.core import Stream

    return Stream.from_handle(address)
