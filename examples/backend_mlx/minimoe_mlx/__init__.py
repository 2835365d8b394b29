"""MLX's arrays as a minimoe backend: the array layer over lazy arrays, and steps that MLX compiles. An example of backends/README.md.

`MlxBackend("gpu")` names the device, or MINIMOE_MLX_DEVICE does: cpu or gpu (Metal on a Mac); without either, MLX chooses.
"""

import os
from importlib.metadata import version
from typing import Any
from weakref import ref

import mlx.core as mx
import numpy as np

from minimoe.backend import Array, Backend, BackendUnavailable
from minimoe.functional import FunctionalBackend, Holder, on_library_arrays
from minimoe.functional.backend import Pure

WRITES = 64  # they are computed after so many: a graph that nobody reads would grow from step to step


class Namespace:
    """`mlx.core` with the names of the Array API standard. Sums over no elements are 0: MLX's own may never end on a CPU (MLX 0.32.4)."""

    bool = mx.bool_
    argsort = staticmethod(lambda x, axis=-1, stable=True: mx.argsort(x, axis=axis).astype(mx.int32))  # it is stable, with NaN last
    clip = staticmethod(lambda x, min=None, max=None: mx.clip(x, min, max))

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)

    def any(self, x: Array, *, axis: Any = None, keepdims: Any = False) -> Array:
        return self.sum(x != 0, axis=axis, keepdims=keepdims) > 0

    def matmul(self, x: Array, y: Array) -> Array:
        wide = mx.float64 if is_long(x, x.shape[-1]) else x.dtype
        return mx.matmul(x.astype(wide), y.astype(wide)).astype(x.dtype)

    def mean(self, x: Array, *, axis: Any = None, keepdims: Any = False) -> Array:
        total = self.sum(x, axis=axis, keepdims=keepdims)
        return total / (x.size / total.size if x.size else 0.0)

    def sum(self, x: Array, *, axis: Any = None, dtype: Any = None, keepdims: Any = False) -> Array:
        x = x if dtype is None else x.astype(dtype)
        total = mx.sum(x, axis=axis, keepdims=keepdims)
        if is_long(x, x.size // max(1, total.size)):
            total = mx.sum(x.astype(mx.float64), axis=axis, keepdims=keepdims).astype(x.dtype)
        return total if x.size else mx.zeros(total.shape, total.dtype)


def is_long(x: Array, terms: int) -> bool:
    """Return True if sums of that many terms need float64: on a CPU, where MLX adds one number after another in float32."""
    return terms > 2**15 and x.dtype == mx.float32 and mx.default_device() == mx.cpu


class MlxBackend(FunctionalBackend):
    """MLX on one device, which becomes MLX's default. Raises `BackendUnavailable` if this machine, or this MLX, has no such device."""

    name = "mlx"
    library = frozenset({"grouped_matmul", "grouped_matmul_dw"})
    dtypes = ("float32",)
    plain = Namespace()

    def __init__(self, device: str = "") -> None:
        if device not in ("", "cpu", "gpu") or (device and not mx.is_available(getattr(mx, device))):
            raise BackendUnavailable(f"backend mlx: no {device} here for MLX {version('mlx')}")
        mx.set_default_device(getattr(mx, device) if device else mx.default_device())
        self._written: list[ref[Array]] = []  # since the last that were computed
        self._tracing = False
        super().__init__()

    def from_numpy(self, array: np.ndarray[Any, Any]) -> Array:
        dtype = getattr(self.plain, array.dtype.name)
        return mx.array(np.ascontiguousarray(array), dtype=dtype).reshape(array.shape) if array.size else mx.zeros(array.shape, dtype)

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        return np.array(x)

    def with_part(self, x: Array, index: Any, part: Any) -> Array:
        y = x.__copy__()  # another name of the same numbers; MLX gives it new ones below
        y[index] = part
        return self._computed_soon(y)

    def with_added(self, x: Array, index: Array, rows: Array) -> Array:
        return x.at[index].add(rows) if index.size else x

    def filled(self, like: Array, new: Any) -> Array:
        return self._computed_soon(super().filled(like, new))

    def _computed_soon(self, y: Array) -> Array:
        """Return y; every so often, start computing all that was written and is still in use."""
        if not self._tracing:
            self._written.append(ref(y))
        if len(self._written) >= WRITES:
            self._compute()
        return y

    def _compute(self) -> None:
        mx.async_eval([y for y in (written() for written in self._written) if y is not None])
        self._written.clear()

    erf = on_library_arrays(lambda self, x: mx.erf(x))

    def synchronize(self) -> None:
        self._compute()
        mx.synchronize()

    def memory(self) -> dict[str, int]:
        return {"used": mx.get_active_memory(), "peak": mx.get_peak_memory()}

    def compile(self, function: Pure) -> Pure | None:
        @mx.compile
        def compiled(state: list[Array], arguments: list[Array]) -> tuple[list[Array], Array]:
            self._tracing = True
            try:
                return function(state, arguments)
            finally:
                self._tracing = False

        def step(state: list[Array], arguments: list[Array]) -> tuple[list[Array], Array]:
            after = compiled(state, arguments)
            mx.async_eval(after)
            return after

        return step

    def grouped_matmul(self, x: Array, weight: Array, offsets: Array, transpose: bool = False, out: Array | None = None) -> Array:
        if is_long(x.value, x.shape[1]):  # the reference's products are of `plain.matmul`
            return super().grouped_matmul(x, weight, offsets, transpose, out)
        ends, row = offsets.value[1:], mx.arange(x.shape[0])[:, None]
        expert = mx.minimum(mx.sum(row >= ends, axis=1), len(ends) - 1).astype(mx.uint32)  # [R]; rows past the last offset have none
        matrices = weight.value if transpose else mx.swapaxes(weight.value, 1, 2)
        y = mx.gather_mm(x.value[:, None, :], matrices, rhs_indices=expert, sorted_indices=True)[:, 0, :]
        return self.store(Holder(mx.where(row < ends[-1], y, 0.0), self), out)

    def grouped_matmul_dw(self, dy: Array, x: Array, offsets: Array, out: Array | None = None, accumulate: bool = False) -> Array:
        if is_long(x.value, x.shape[0]):
            return super().grouped_matmul_dw(dy, x, offsets, out, accumulate)
        bounds = mx.stack([offsets.value[:-1], offsets.value[1:]], axis=1).astype(mx.uint32)  # [E,2]
        return self.store(Holder(mx.segmented_mm(dy.value.T, x.value, bounds), self), out, accumulate)


def backend_class() -> type[Backend]:
    """Return the class, which needs no device: `minimoe backends` lists it if `backend` fails."""
    return MlxBackend


def backend() -> Backend:
    """Return the backend on the device that MINIMOE_MLX_DEVICE names, by default the one that MLX prefers."""
    return MlxBackend(os.environ.get("MINIMOE_MLX_DEVICE", ""))
