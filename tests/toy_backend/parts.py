"""What the toy's kernels share: scratch memory, and writing a result where the caller wants it."""

from typing import Any

import numpy as np
import numpy.typing as npt

from minimoe.backend import Backend

Array = npt.NDArray[Any]


class Scratch(Backend):
    """Buffers that are kept from call to call, one for each use, shape and dtype, since fresh memory is slow.

    A buffer holds anything when it is taken, and may hold anything after its kernel has returned: no kernel returns or saves one.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, tuple[int, ...], Any], Array] = {}

    def _scratch(self, use: str, shape: tuple[int, ...], dtype: Any) -> Array:
        key = use, shape, np.dtype(dtype)
        if key not in self._buffers:
            self._buffers[key] = np.empty(shape, dtype)
        return self._buffers[key]


def put(value: Array, out: Array | None, accumulate: bool = False) -> Array:
    """Return `value`, or write it into `out` (or add it to what is there) and return `out`."""
    if out is None:
        return value
    if accumulate:
        np.add(out, value, out=out)
    else:
        np.copyto(out, value)
    return out


def as_rows(x: Array) -> Array:
    """[...,D] -> [N,D]"""
    return x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1])


def logistic(x: Array) -> Array:
    """1 / (1 + e^-x) as e^-ln(1 + e^-x), which overflows nowhere."""
    return np.exp(-np.logaddexp(0.0, -x, dtype=x.dtype))
