"""The array layer: what an array library must offer before any kernel can run. A backend must implement it, and nothing more.

`xp` is a namespace with the functions of the Array API standard (2024.12) that minimoe uses: `XP_FUNCTIONS` and `XP_CONSTANTS` in
`minimoe/testing/array_layer.py`, which also checks all that is said here. The rest are the few operations that the standard lacks.

- Arrays are mutable. Slices, and reshapes of contiguous slices, are views: what is written to one is seen in the other. Operators in place
  and writes by index keep the dtype of the array that is written. A Python number takes the dtype of the array beside it (if that is
  half precision, the result may be wider).
- Indices, counts and plans are int32. int64 is needed too: random numbers are words of 32 bits within int64 (sums, products and shifts
  below 2^49, and the bit operations), and the indices of `take_along_axis` are int64. float64 is not needed.
- `xp.argsort` is stable; its result may have any integer dtype (`argsort` below casts it).
- No array is selected by a mask (`x[mask]`), since the shape of the result would depend on numbers.
- Only `to_host` and `offsets_on_host` read an array on the host.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from minimoe.errors import ConfigError

FLOATS = ("float32", "float64", "bfloat16", "float16")
Array: TypeAlias = Any
"""An array of the backend's library."""


class ArrayLayer(ABC):
    """Arrays of one library on one device."""

    name: str
    dtypes: tuple[str, ...]  # of FLOATS; float32 alone is enough
    xp: Any
    reads_offsets = True  # grouped references read the experts' row offsets on the host; False: they mask, at E times the work
    alignment = 1  # bytes: parameters and their gradients begin at multiples of it in their flat buffers (16: a GPU's widest access)
    cache_elements = 0  # if > 0, work of many passes takes this many elements at a time, which fit the processor's cache

    @abstractmethod
    def from_host(self, array: np.ndarray[Any, Any]) -> Array:
        """Copy a NumPy array to the device and keep its dtype."""

    @abstractmethod
    def to_host(self, array: Array) -> np.ndarray[Any, Any]:
        """Return a copy in a NumPy array. It waits for the device, so a training step never calls it."""

    @abstractmethod
    def scatter_add(self, inout_target: Array, index: Array, values: Array) -> None:
        """inout_target[index[i]] += values[i], equal rows in the order of i; a negative index counts from the end.

        target [V,...], index [N] int32, values [N,...]
        """

    @abstractmethod
    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        """Return the k largest along the last axis, largest first; ties go to the lowest index, NaN last.   -> values, ids int32 [...,k]"""

    @abstractmethod
    def bincount(self, ids: Array, minlength: int) -> Array:
        """Count how often each of 0 .. minlength-1 occurs.   ids [N] int32 in range -> int32 [minlength]"""

    @abstractmethod
    def erf(self, x: Array) -> Array:
        """The error function, elementwise, to the dtype's precision."""

    @abstractmethod
    def contiguous(self, x: Array) -> Array:
        """Return x in C-contiguous memory: x itself if it is contiguous already."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has finished its work."""

    @abstractmethod
    def memory(self) -> dict[str, int]:
        """Return the bytes in use now and at the peak: {"used": ..., "peak": ...}."""

    # ---- small helpers over xp, shared by the references; a backend need not touch them --------------------------------------

    def dtype(self, name: str) -> Any:
        """Return the library's dtype of that name. Raises ConfigError if the backend lacks it."""
        if (name in FLOATS and name not in self.dtypes) or not hasattr(self.xp, name):
            raise ConfigError(f"backend {self.name} has no {name}: it has {', '.join(self.dtypes)}")
        return getattr(self.xp, name)

    def offsets_on_host(self, offsets: Array) -> list[int]:
        """Return row offsets [E+1] for a Python loop over experts: the only place where a reference reads the device within a step."""
        return [int(value) for value in self.to_host(offsets)]

    def wide(self, x: Array) -> Array:
        """Return x in the dtype of accumulation: at least float32."""
        wide = self.xp.result_type(x.dtype, self.xp.float32)
        return x if x.dtype == wide else self.xp.astype(x, wide)

    def argsort(self, x: Array, axis: int = -1) -> Array:
        """Return the indices that sort x along an axis, equal elements in their order.   [...] -> int32 [...]"""
        return self.xp.astype(self.xp.argsort(x, axis=axis, stable=True), self.xp.int32, copy=False)

    def store(self, value: Array, out: Array | None, accumulate: bool = False) -> Array:
        """Return `value`, or write it to `out` (or add it) and return `out`."""
        if out is None:
            return value
        if accumulate:
            out += value
        else:
            out[...] = value
        return out

    def for_sum(self, x: Array, out: Array | None) -> Array:
        """Return a factor of a weight's gradient: in at least float32 if the gradient is kept in another dtype, in `out`."""
        return x if out is None or out.dtype == x.dtype else self.wide(x)

    def narrowed(self, total: Array, x: Array, out: Array | None) -> Array:
        """Return a sum over x that was made in at least float32: in the dtype of x unless it is kept in another, in `out`."""
        return self.xp.astype(total, x.dtype, copy=False) if out is None or out.dtype == x.dtype else total

    def sigmoid(self, x: Array) -> Array:
        """1 / (1 + exp(-x)); below -80, where exp(-x) would overflow in float32, the value at -80."""
        e = self.xp.exp(-self.xp.clip(x, min=-80.0))
        e += 1.0
        return 1.0 / e

    def softmax(self, x: Array) -> Array:
        """exp(x) over its sum along the last axis; a row of -inf alone gives NaN, as in the literature."""
        e = x - self.xp.max(x, axis=-1, keepdims=True)
        e = self.xp.exp(e)
        e /= self.xp.sum(e, axis=-1, keepdims=True)
        return e

    def logsumexp(self, x: Array) -> Array:
        """log(sum(exp(x))) along the last axis; -inf for a row of -inf alone, whose sum is 0.   [...,E] -> [...]"""
        top = self.xp.max(x, axis=-1, keepdims=True)
        top = self.xp.where(top == -self.xp.inf, self.xp.zeros_like(top), top)
        total = self.xp.sum(self.xp.exp(x - top), axis=-1, keepdims=True)
        return self.xp.squeeze(top + self.xp.log(total), axis=-1)

    def by_parts(self, function: Callable[..., Array], *arrays: Array) -> Array:
        """Return function(*arrays), for an elementwise function; if `cache_elements` is set, compute some rows at a time."""
        arrays = tuple(self.rows(a) if a.ndim != 2 else a for a in arrays)
        n, width = arrays[0].shape
        step = max(1, self.cache_elements // max(1, width)) if self.cache_elements else n
        if n <= step:
            return function(*arrays)
        first = function(*(a[:step, :] for a in arrays))
        y = self.xp.empty((n, first.shape[1]), dtype=first.dtype)
        y[:step, :] = first
        for start in range(step, n, step):
            y[start : start + step, :] = function(*(a[start : start + step, :] for a in arrays))
        return y

    def rows(self, x: Array) -> Array:
        """Return x with its leading axes joined; a 0-d x becomes a row of one.   [...,D] -> [N,D]"""
        n = 1
        for size in x.shape[:-1]:
            n *= size
        return self.xp.reshape(x, (n, x.shape[-1] if x.shape else 1))
