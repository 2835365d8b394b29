"""What every override does to arrays before its kernel runs: are they float32, as contiguous rows, in pieces of which size."""

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
    """Are all of these float32? What is None does not count. Kernels compute in float32; the reference does all else."""
    for array in arrays:  # noqa: SIM110 - it runs hundreds of times a step, and a generator costs a microsecond
        if array is not None and array.dtype != FLOAT32:
            return False
    return True


def as_rows(x: Array) -> Array:
    """x as contiguous rows.   [...,D] -> [N,D]"""
    if x.ndim != 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1] if x.ndim else 1)
    return contiguous(x)


def result(out: Array | None, shape: tuple[int, ...]) -> Array:
    """Where a kernel writes: `out` where it can write there, else fresh memory (for `store` to copy, or to refuse)."""
    if out is not None and out.shape == shape and out.flags.c_contiguous and out.dtype == FLOAT32:
        return out
    return empty(shape)


@kernel
def clear(start: int, stop: int, y: F1) -> None:
    y[start:stop] = np.float32(0.0)


def zeros(shape: tuple[int, ...] | int, dtype: Any = FLOAT32) -> Array:
    """np.zeros; in a step that is recorded a kernel among kernels, where it is float32."""
    if recorder.tape is None:
        return np.zeros(shape, dtype)
    if dtype != FLOAT32:
        return filled(shape, 0, dtype)
    y = empty(shape)
    clear(y.size, PIECE, y.reshape(-1))
    return y


def by_width(width: int, elements: int = PIECE) -> int:
    """Rows to a piece."""
    return max(1, elements // max(1, width))


def parts_of(n: int) -> tuple[int, int]:
    """For a sum over n rows: rows to a piece and the number of pieces, by n alone."""
    grain = max(1, -(-n // PARTS))
    return grain, -(-n // grain)


def optional(x: Array | None, like: Array = NO_FLOATS) -> Any:
    """x, or an empty array in its place: kernels take arrays alone."""
    return like if x is None else x
