"""Helpers that overrides call before they run a kernel: check dtypes, make rows contiguous, choose the size of pieces."""

import math
from typing import Any

import numpy as np

from minimoe.backend import Array
from minimoe_numba.creation import contiguous, empty, filled
from minimoe_numba.kernel import F1, kernel
from minimoe_numba.traced import recorder

FLOAT32 = np.dtype(np.float32)
PIECE = 16384  # elements of a piece: some microseconds of work, 64 KiB
PARTS = 16  # pieces of a sum over rows, whatever the number of threads, so that it is always added up in the same order
NO_FLOATS = np.zeros(0, np.float32)
NO_BOOLS = np.zeros(0, np.bool_)


def singles(*arrays: Array | None) -> bool:
    """True if all of these that are not None are float32. Kernels compute in float32; the reference does everything else."""
    for array in arrays:  # noqa: SIM110 - it runs hundreds of times per step, and a generator costs a microsecond
        if array is not None and array.dtype != FLOAT32:
            return False
    return True


def as_rows(x: Array) -> Array:
    """Return x as contiguous rows.   [...,D] -> [N,D]"""
    if x.ndim != 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1] if x.ndim else 1)
    return contiguous(x)


def result(out: Array | None, shape: tuple[int, ...]) -> Array:
    """Return the array that a kernel writes: `out` if it can, else new memory, which `store` copies to `out` or refuses."""
    if out is not None and out.shape == shape and out.flags.c_contiguous and out.dtype == FLOAT32:
        return out
    return empty(shape)


@kernel
def clear(start: int, stop: int, y: F1) -> None:
    y[start:stop] = np.float32(0.0)


def zeros(shape: tuple[int, ...] | int, dtype: Any = FLOAT32) -> Array:
    """Like np.zeros. While a step is recorded, float32 zeros are written by a kernel, so that they do not end a run of kernels."""
    if recorder.tape is None:
        return np.zeros(shape, dtype)
    if dtype != FLOAT32:
        return filled(shape, 0, dtype)
    y = empty(shape)
    clear(y.size, PIECE, y.reshape(-1))
    return y


def by_width(width: int, elements: int = PIECE) -> int:
    """Return the number of rows per piece, for rows of this width."""
    return max(1, elements // max(1, width))


def parts_of(n: int) -> tuple[int, int]:
    """Return the rows per piece and the number of pieces of a sum over n rows. They depend on n alone."""
    grain = max(1, -(-n // PARTS))
    return grain, -(-n // grain)


def optional(x: Array | None, like: Array = NO_FLOATS) -> Any:
    """Return x, or an empty array if x is None, since kernels take only arrays."""
    return like if x is None else x
