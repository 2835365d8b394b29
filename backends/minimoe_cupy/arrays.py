"""The array layer on an NVIDIA card: CuPy's arrays from CuPy's pool of memory, bfloat16 through ml_dtypes.

Only `to_host` and `synchronize` wait for the device, so that a step can be captured as a CUDA graph (`cupy.bincount` would wait, and
`argsort` before CuPy 14.2). `scatter_add` is a kernel of the backends that build on this module.
"""

import re
from collections.abc import Callable
from typing import Any

import cupy
import cupyx
import ml_dtypes
import numpy as np
from cupyx.scipy import special

from minimoe.backend import Array, Backend
from minimoe_cupy.cublas import Cublas
from minimoe_cupy.graph import record, refuse_while_capturing

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
AT_ONCE = 8
cublas = Cublas()


class Namespace:
    """CuPy's namespace, with bfloat16 as a name and as a floating type, and with the standard's names that CuPy has only from 14.2 on."""

    bfloat16 = BFLOAT16

    def __getattr__(self, name: str) -> Any:
        return getattr(cupy, name)

    def isdtype(self, dtype: Any, kind: Any) -> bool:
        return kind == "real floating" if dtype == BFLOAT16 else np.isdtype(dtype, kind)

    def cumulative_sum(self, x: Array, axis: int = 0) -> Array:
        return cupy.cumsum(x, axis=axis)

    def matrix_transpose(self, x: Array) -> Array:
        return cupy.swapaxes(x, -1, -2)

    def argsort(self, x: Array, axis: int = -1, stable: bool = True) -> Array:
        return cupy.argsort(x, axis=axis, kind="stable")

    def asarray(self, x: Any, **options: Any) -> Array:
        if not isinstance(x, cupy.ndarray):
            refuse_while_capturing("a host number became an array")
        return cupy.asarray(x, **options)

    def matmul(self, a: Array, b: Array, out: Array = None) -> Array:
        """Returns a b, in `out` if given, which may be float32 for bfloat16: sums are then not rounded."""
        if a.ndim >= 2 and b.ndim >= 2 and a.dtype == b.dtype:
            leading = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
            y = cupy.empty((*leading, a.shape[-2], b.shape[-1]), dtype=a.dtype) if out is None else out
            if cublas.matmul_batch(a, b, y, cupy.ascontiguousarray) if leading else cublas.matmul(a, b, y):
                return y
        if out is not None and out.dtype != a.dtype:
            a, b = a.astype(out.dtype), b.astype(out.dtype)
        return cupy.matmul(a, b, out=out)

    def concat(self, arrays: Any, axis: int = 0) -> Array:
        """Joins eight arrays at a time: for more, CuPy builds a table on the host, which cannot be recorded."""
        arrays = list(arrays)
        while len(arrays) > AT_ONCE:
            arrays = [cupy.concatenate(arrays[i : i + AT_ONCE], axis=axis) for i in range(0, len(arrays), AT_ONCE)]
        return cupy.concatenate(arrays, axis=axis)

    def stack(self, arrays: Any, axis: int = 0) -> Array:
        return self.concat([cupy.expand_dims(array, axis) for array in arrays], axis=axis)

    def clip(self, x: Array, min: Any = None, max: Any = None) -> Array:
        return cupy.clip(x, min, max)


class CupyArrays(Backend):
    """CuPy's arrays on the current device."""

    dtypes = ("float32", "float64", "bfloat16")
    xp: Any = Namespace()

    def from_host(self, array: np.ndarray[Any, Any]) -> Array:
        refuse_while_capturing("an array was copied from the host")
        return cupy.array(array, order="C", copy=True)

    def to_host(self, array: Array) -> np.ndarray[Any, Any]:
        return cupy.asnumpy(array)

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        ids = cupy.argsort(-self.wide(x), axis=-1, kind="stable")[..., :k]
        return cupy.take_along_axis(x, ids, axis=-1), ids.astype(cupy.int32)

    def bincount(self, ids: Array, minlength: int) -> Array:
        counts = cupy.zeros(minlength, dtype=cupy.int32)
        cupyx.scatter_add(counts, ids, 1)  # integers: any order gives the same sums
        return counts

    def erf(self, x: Array) -> Array:
        return special.erf(self.wide(x)).astype(x.dtype, copy=False)

    def contiguous(self, x: Array) -> Array:
        return cupy.ascontiguousarray(x)

    def synchronize(self) -> None:
        cupy.cuda.get_current_stream().synchronize()

    def memory(self) -> dict[str, int]:
        """Returns the bytes of CuPy's pool; a recorded step has a pool of its own."""
        pool = cupy.get_default_memory_pool()
        return {"used": pool.used_bytes(), "peak": pool.total_bytes()}

    def out_of_memory(self, error: BaseException) -> tuple[int, int] | None:
        if not isinstance(error, cupy.cuda.memory.OutOfMemoryError):
            return None
        asked = re.search(r"allocating ([\d,]+) bytes", str(error))
        return int(asked[1].replace(",", "")) if asked else 0, cupy.cuda.runtime.memGetInfo()[0]

    def record(self, work: Callable[[], None], say: Callable[[str], None]) -> Callable[[], None] | None:
        return record(work, say, cublas.workspace)
