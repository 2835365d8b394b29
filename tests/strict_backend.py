"""A complete backend over array_api_strict, a library with nothing but the Array API standard: the array layer and no kernel.

What runs here runs on any library that keeps the standard. float64 is there, so results agree with NumPy's to rounding.
"""

from typing import Any

import array_api_strict
import numpy as np

from minimoe.backend import Array, Backend
from minimoe_numpy.erf import erf


class StrictBackend(Backend):
    """array_api_strict on the host."""

    name = "strict"
    dtypes = ("float32", "float64")
    xp = array_api_strict

    def from_host(self, array: np.ndarray[Any, Any]) -> Array:
        return array_api_strict.asarray(np.array(array, order="C", copy=True))

    def to_host(self, array: Array) -> np.ndarray[Any, Any]:
        return np.asarray(array._array)

    def scatter_add(self, inout_target: Array, index: Array, values: Array) -> None:
        np.add.at(inout_target._array, index._array, values._array)

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        xp = self.xp
        ids = xp.argsort(-x, axis=-1, stable=True)[..., :k]
        return xp.take_along_axis(x, ids, axis=-1), xp.astype(ids, xp.int32)

    def bincount(self, ids: Array, minlength: int) -> Array:
        xp = self.xp
        hit = ids[:, None] == xp.arange(minlength, dtype=xp.int32)
        return xp.sum(xp.astype(hit, xp.int32), axis=0, dtype=xp.int32)

    def erf(self, x: Array) -> Array:
        return array_api_strict.asarray(erf(x._array))

    def contiguous(self, x: Array) -> Array:
        return array_api_strict.asarray(np.ascontiguousarray(x._array))

    def synchronize(self) -> None:
        """Nothing is asynchronous here."""

    def memory(self) -> dict[str, int]:
        return {"used": 0, "peak": 0}
