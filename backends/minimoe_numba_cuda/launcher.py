"""How kernels are launched on a card: on the array library's stream, and without waiting for anything.

Numba takes foreign arrays as they are, but then asks whose stream wrote them, and waits for it: a step could not be recorded as a CUDA
graph. All launches here, and CuPy's own work, are queued on one stream, in order, so there is nothing to wait for. Numba is told where an
array lies and what it holds, and no stream.
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
        self.spare = spare  # whose address empty arrays get: they have none of their own, and the driver is asked about each

    def __call__(self, kernel: Any) -> "Configured":
        return Configured(self, kernel)

    def argument(self, value: Any) -> Any:
        """A C-contiguous array of the device as its memory, a number as it is."""
        if not hasattr(value, "data") or not hasattr(value.data, "ptr"):
            return value
        return Memory(value, value.data.ptr if value.size else self.spare.data.ptr)


class Configured:
    """A kernel that waits for its launch shape."""

    def __init__(self, launcher: Launcher, kernel: Any) -> None:
        self.launcher, self.kernel = launcher, kernel

    def __getitem__(self, shape: tuple[Any, ...]) -> Callable[..., None]:
        configured = self.kernel[shape]

        def launch(*args: Any) -> None:
            configured(*map(self.launcher.argument, args))

        return launch


def stream_at(address: int) -> Any:
    """The stream at an address as Numba takes one, which the address itself is not; 0 is the default stream."""
    if not address:
        return 0
    from cuda.core import Stream

    return Stream.from_handle(address)
