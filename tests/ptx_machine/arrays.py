"""The array layer for GPU kernels that run on the machine: NumPy with the bfloat16 of ml_dtypes, as CuPy has it."""

from typing import Any

import ml_dtypes
import numpy as np

from minimoe_numpy import NumpyBackend

from .machine import unwritten

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Namespace:
    """NumPy's namespace, in which bfloat16 has a name and is a floating type, and memory that nobody wrote is known as such."""

    bfloat16 = BFLOAT16

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, shape: Any, dtype: Any = np.float64) -> Any:
        return unwritten(shape, dtype)

    def empty_like(self, x: Any, dtype: Any = None) -> Any:
        return unwritten(x.shape, dtype or x.dtype)

    def isdtype(self, dtype: Any, kind: Any) -> bool:
        return kind == "real floating" if dtype == BFLOAT16 else np.isdtype(dtype, kind)

    def matmul(self, a: Any, b: Any, out: Any = None) -> Any:
        """Products of bfloat16 with sums in float32, rounded once or stored in a float32 `out`, as cuBLAS does them."""
        if BFLOAT16 not in (a.dtype, b.dtype):
            return np.matmul(a, b, out=out)
        y = np.matmul(a.astype(np.float32), b.astype(np.float32))
        if out is None:
            return y.astype(np.result_type(a, b))
        out[...] = y
        return out


class HostArrays(NumpyBackend):
    """NumPy arrays in the dtypes of a card."""

    dtypes = ("float32", "float64", "bfloat16")
    xp: Any = Namespace()

    def erf(self, x: Any) -> Any:
        return super().erf(self.wide(x)).astype(x.dtype)

    def top_k(self, x: Any, k: int) -> Any:
        values, ids = super().top_k(self.wide(x), k)
        return values.astype(x.dtype), ids
