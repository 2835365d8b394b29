"""The array layer of the toy: NumPy itself, and the few operations that it lacks."""

import math
import resource
from collections.abc import Callable
from typing import Any

import numpy as np

from minimoe.backend import Work
from toy_backend.parts import Array, Scratch


class ToyArrays(Scratch):
    dtypes = ("float32", "float64")
    xp: Any = np

    def from_host(self, array: Array) -> Array:
        return np.array(array, order="C", copy=True)

    def to_host(self, array: Array) -> Array:
        return np.array(array, copy=True)

    def scatter_add(self, inout_target: Array, index: Array, values: Array) -> None:
        np.add.at(inout_target, index, values)

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        ids = np.argsort(-x, axis=-1, kind="stable")[..., :k]  # a NaN comes last, and -NaN too
        return np.take_along_axis(x, ids, axis=-1), ids.astype(np.int32)

    def bincount(self, ids: Array, minlength: int) -> Array:
        counts = np.zeros(minlength, dtype=np.int32)
        np.add.at(counts, ids, 1)
        return counts

    def erf(self, x: Array) -> Array:
        return np.vectorize(math.erf, otypes=[x.dtype])(x)

    def contiguous(self, x: Array) -> Array:
        return np.ascontiguousarray(x)

    def synchronize(self) -> None:
        """Do nothing: NumPy returns when it is done."""

    def memory(self) -> dict[str, int]:
        """Return the peak of the process's memory in bytes, as what it uses too."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"used": peak, "peak": peak}

    def record(self, work: Work, say: Callable[[str], None]) -> Callable[[], None] | None:
        """Repeat the work itself: it reads its arguments and what it keeps from the same arrays each time."""
        work()
        return work
