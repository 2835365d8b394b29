"""What all topics share on the host: launching a kernel, and checking its arguments.

    self._launch(kernel, (blocks,), (threads,), x, y, 0.5, shared=bytes)

is one launch through `run`, which a backend is constructed with: `run(kernel)[grid, block, stream, shared_bytes](*args)`. On a GPU it is
`Launcher`, on a processor the machine in tests/ptx_machine. Nothing here waits for the device or reads from it.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from minimoe.backend import Array, Backend

THREADS = 128  # threads per block of an elementwise kernel
SHARED_LIMIT = 48 * 1024  # bytes of shared memory that a block has by default

F32, F64, I32, I64, BOOL = (np.dtype(kind) for kind in ("float32", "float64", "int32", "int64", "bool"))
Shape = tuple[int | None, ...]


def blocks_of(n: int, size: int = THREADS) -> int:
    """Returns how many blocks of `size` cover n."""
    return -(-n // size)


def singles(*arrays: Array | None) -> bool:
    """Returns True if all arrays that are not None are float32, which kernels compute in. Any other call goes to the reference."""
    return all(array is None or array.dtype == F32 for array in arrays)


def expect(kernel: str, name: str, array: Array, shape: Shape, dtype: Any = F32) -> None:
    """Raises TypeError for another dtype, and ValueError for another shape (None: any size) or a strided array."""
    if array.dtype != dtype:
        raise TypeError(f"{kernel}: {name} must be {dtype}, not {array.dtype}")
    if len(array.shape) != len(shape) or any(want not in (None, size) for want, size in zip(shape, array.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{kernel}: {name} must have shape ({wanted}), not {tuple(array.shape)}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{kernel}: {name} of shape {tuple(array.shape)} must be C-contiguous, not of strides {array.strides}")


class CudaKernels(Backend):
    """A backend whose kernels are launched through `run`; each topic adds its own. The array layer comes from a class beside it."""

    def __init__(self, run: Callable[[Any], Any]) -> None:
        self._run = run

    def _stream(self) -> Any:
        """Returns the stream that kernels are queued on: that of the array library."""
        return 0

    def _launch(self, kernel: Any, grid: tuple[int, ...], block: tuple[int, ...], *args: Any, shared: int = 0) -> None:
        """Queues a kernel, unless the grid is empty. Arrays must be C-contiguous; Python's numbers become int64 and float32."""
        if 0 in grid:
            return
        for i, argument in enumerate(args):
            if hasattr(argument, "flags") and not argument.flags.c_contiguous:
                raise ValueError(f"{kernel.py_func.__name__}: argument {i} must be C-contiguous, not of strides {argument.strides}")
        given = [np.float32(argument) if isinstance(argument, float) else argument for argument in args]
        self._run(kernel)[grid, block, self._stream(), shared](*given)

    def _read(self, kernel: str, name: str, array: Array | None, shape: Shape, dtype: Any = F32) -> Array:
        """Returns an input as kernels read it: contiguous (copied if it was not), of that shape and dtype; for None an array of size 0."""
        if array is None:
            return self.xp.empty((0,) * len(shape), dtype=dtype)
        array = self.contiguous(array)
        expect(kernel, name, array, shape, dtype)
        return array

    def _empty(self, *shape: int, dtype: Any = F32) -> Array:
        """Allocates a result."""
        return self.xp.empty(shape, dtype=dtype)

    def _result(self, out: Array | None, shape: tuple[int, ...]) -> Array:
        """Returns `out` if a kernel can write into it, else new memory, which `_stored` copies into `out`."""
        if out is not None and tuple(out.shape) == shape and out.dtype == F32 and out.flags.c_contiguous:
            return out
        return self._empty(*shape)

    def _stored(self, y: Array, out: Array | None) -> Array:
        """Returns y, or `out` after y was copied into it."""
        return y if out is None or y is out else self.store(y, out)

    def _one(self, value: Any, dtype: Any = F32) -> Array:
        """Returns a Python number or a 0-d array as the array of one element that a kernel reads on the device."""
        if isinstance(value, (int, float)):
            return self.xp.full((1,), value, dtype=dtype)  # full runs a kernel; asarray would copy from the host
        return self.xp.reshape(self.xp.asarray(value, dtype=dtype), (1,))

    def _flat_rows(self, x: Array) -> Array:
        """Returns x as contiguous rows.   [...,D] -> [N,D]"""
        return self.contiguous(x if x.ndim == 2 else self.xp.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1] if x.ndim else 1)))
