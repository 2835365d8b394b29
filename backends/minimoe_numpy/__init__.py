"""The smallest backend: NumPy arrays and no kernels of its own. Read it before you port another.

Everything here is the array layer. Every kernel is its reference, which runs on any array layer.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from minimoe.backend import Array, Backend
from minimoe_numpy.erf import erf
from minimoe_numpy.memory import keep_freed_memory

__all__ = ["NumpyBackend", "backend"]


class NumpyBackend(Backend):
    """NumPy on the host."""

    name = "numpy"
    dtypes = ("float32", "float64")
    xp: Any = np
    cache_elements = 65536  # 256 KiB of float32

    def from_host(self, array: np.ndarray[Any, Any]) -> Array:
        return np.array(array, order="C", copy=True)

    def adopt(self, array: np.ndarray[Any, Any]) -> Array:
        return array

    def to_host(self, array: Array) -> np.ndarray[Any, Any]:
        return np.asarray(array)

    def scatter_add(self, inout_target: Array, index: Array, values: Array) -> None:
        if not len(index):
            return
        index = self.xp.arange(len(inout_target), dtype=index.dtype)[index]  # -1 and V - 1 name one row, which must be one in `present`
        order = np.argsort(index, kind="stable")  # sum sorted rows, since np.add.at is slower
        present, starts = np.unique(index[order], return_index=True)
        inout_target[present] += np.add.reduceat(values[order], starts, axis=0)

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        ids = np.argsort(-x, axis=-1, kind="stable")[..., :k]
        return np.take_along_axis(x, ids, axis=-1), ids.astype(np.int32)

    def bincount(self, ids: Array, minlength: int) -> Array:
        return np.bincount(ids, minlength=minlength).astype(np.int32)

    def erf(self, x: Array) -> Array:
        return erf(x)

    def sigmoid(self, x: Array) -> Array:
        with np.errstate(over="ignore"):  # exp(-x) = infinity gives the right 0
            y = np.asanyarray(np.negative(x))  # NumPy returns 0-d results as scalars, which cannot be written
            np.exp(y, out=y)
            y += 1.0
            return np.reciprocal(y, out=y)

    def contiguous(self, x: Array) -> Array:
        return np.ascontiguousarray(x)

    def synchronize(self) -> None:
        """Do nothing: NumPy returns when it is done."""

    def memory(self) -> dict[str, int]:
        """Return the process's resident memory in bytes and its peak. `used` is the peak too except on Linux; both are 0 on Windows."""
        if sys.platform == "win32":
            return {"used": 0, "peak": 0}
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        statm = Path("/proc/self/statm")
        used = int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else peak
        return {"used": used, "peak": max(used, peak)}


def backend() -> Backend:
    """Return the NumPy backend, which runs everywhere."""
    keep_freed_memory()
    return NumpyBackend()
