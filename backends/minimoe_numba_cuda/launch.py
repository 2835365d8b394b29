"""What all topics share on the host: how a kernel is launched, and what it may be given.

    self._launch(kernel, (blocks,), (threads,), x, y, 0.5, shared=bytes)

is one launch through `run`, the callable that a backend is made with: `run(kernel)[grid, block, stream, shared_bytes](*args)`. On a GPU it
is Numba's own, on a processor that of the harness in tests/cuda_on_cpu. Nothing here waits for the device or reads from it.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from minimoe.backend import Array, Backend

THREADS = 128  # of a block of an elementwise kernel
SHARED_LIMIT = 48 * 1024  # bytes of shared memory that a block has without asking the driver for more

F32, F64, I32, I64, BOOL = (np.dtype(kind) for kind in ("float32", "float64", "int32", "int64", "bool"))
Shape = tuple[int | None, ...]


def blocks_of(n: int, size: int = THREADS) -> int:
    """How many blocks of `size` cover n."""
    return -(-n // size)


def singles(*arrays: Array | None) -> bool:
    """Are all of these float32? What is None does not count. Kernels compute in float32; all else goes to the reference."""
    return all(array is None or array.dtype == F32 for array in arrays)


def expect(kernel: str, name: str, array: Array, shape: Shape, dtype: Any = F32) -> None:
    """Refuse what a kernel would misread: TypeError for another dtype, ValueError for another shape (None: any size) or a strided array."""
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
        """The stream that kernels are queued on: that of the array library."""
        return 0

    def _launch(self, kernel: Any, grid: tuple[int, ...], block: tuple[int, ...], *args: Any, shared: int = 0) -> None:
        """Queue a kernel. Arrays must be C-contiguous; Python's numbers arrive as int64 and float32; without a block nothing runs."""
        if 0 in grid:
            return
        for i, argument in enumerate(args):
            if hasattr(argument, "flags") and not argument.flags.c_contiguous:
                raise ValueError(f"{kernel.py_func.__name__}: argument {i} must be C-contiguous, not of strides {argument.strides}")
        given = [np.float32(argument) if isinstance(argument, float) else argument for argument in args]
        self._run(kernel)[grid, block, self._stream(), shared](*given)

    def _read(self, kernel: str, name: str, array: Array | None, shape: Shape, dtype: Any = F32) -> Array:
        """An input as a kernel reads it: contiguous (copied where it was not), of that shape and dtype; None as an array of size 0."""
        if array is None:
            return self.xp.empty((0,) * len(shape), dtype=dtype)
        array = self.contiguous(array)
        expect(kernel, name, array, shape, dtype)
        return array

    def _empty(self, *shape: int, dtype: Any = F32) -> Array:
        """Memory for a result."""
        return self.xp.empty(shape, dtype=dtype)

    def _result(self, out: Array | None, shape: tuple[int, ...]) -> Array:
        """Where a kernel writes: `out` where it can write there, else fresh memory for `store` to copy, or to refuse."""
        if out is not None and tuple(out.shape) == shape and out.dtype == F32 and out.flags.c_contiguous:
            return out
        return self._empty(*shape)

    def _stored(self, y: Array, out: Array | None) -> Array:
        """y, or `out` after y came to stand there."""
        return y if out is None or y is out else self.store(y, out)

    def _one(self, value: Any, dtype: Any = F32) -> Array:
        """A number of Python's or a 0-d array, as the array of one that a kernel reads on the device."""
        if isinstance(value, (int, float)):
            return self.xp.full((1,), value, dtype=dtype)  # written by a kernel: asarray would copy from the host
        return self.xp.reshape(self.xp.asarray(value, dtype=dtype), (1,))

    def _flat_rows(self, x: Array) -> Array:
        """x as contiguous rows.   [...,D] -> [N,D]"""
        return self.contiguous(x if x.ndim == 2 else self.xp.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1] if x.ndim else 1)))
