"""The backend `placeholder` of minimoe: a device of its own, whose compiler makes its kernels (`device.py`, `kernels.py`).

The processor stands in for your device and NumPy for its arrays, so that everything here works from the first minute. Replace it function
by function; the comments say with what. After each, run `minimoe backends check placeholder --kernel NAME`. A device without an array
library needs one first: even the simplest array functions (`minimoe.testing.array_layer.XP_FUNCTIONS`) are kernels there.
"""

from collections.abc import Callable
from typing import Any

import numpy as library  # replace by the library of arrays on your device: import cupy as library
import numpy as np

from minimoe.backend import Array, Backend, Work, load

from . import device
from .kernels import SWIGLU


class Namespace:
    """The library's namespace, with functions of the Array API standard where the library's differ.

    `minimoe backends check placeholder` names what is missing.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(library, name)  # what the library has under the standard's name


class PlaceholderBackend(Backend):
    """Arrays in the device's memory. Slices of an array must be views of it, since parameters lie in flat buffers."""

    name = "placeholder"
    dtypes = ("float32", "float64")  # replace by those that the device computes; float32 alone is enough
    proven: dict[str, str] = {}  # kernel -> the device and the date on which you saw it agree with its reference
    xp: Any = Namespace()

    # ---- the array layer -----------------------------------------------------------------------------------------------------------

    def from_host(self, array: np.ndarray[Any, Any]) -> Array:
        return library.array(array, order="C", copy=True)  # replace by the copy to the device

    def to_host(self, array: Array) -> np.ndarray[Any, Any]:
        self.synchronize()
        return np.array(array)  # replace by the copy to the host

    def scatter_add(self, inout_target: Array, index: Array, values: Array) -> None:
        library.add.at(inout_target, index, values)  # replace by a kernel that adds equal rows in order, without atomic operations

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        # 0 - x makes -0.0 tie with 0.0. A kernel of your own is right if ties go to the lowest index and NaN comes last.
        ids = self.xp.argsort(0.0 - x, axis=-1, stable=True)[..., :k]
        return self.xp.take_along_axis(x, ids, axis=-1), self.xp.astype(ids, self.xp.int32)

    def bincount(self, ids: Array, minlength: int) -> Array:
        counts = self.xp.zeros(minlength, dtype=self.xp.int32)
        self.scatter_add(counts, ids, self.xp.ones_like(ids))
        return counts

    def erf(self, x: Array) -> Array:
        return load("numpy").erf(x)  # replace by the library's, or by a kernel

    def contiguous(self, x: Array) -> Array:
        return library.ascontiguousarray(x)

    def synchronize(self) -> None:
        device.synchronize()

    def memory(self) -> dict[str, int]:
        return load("numpy").memory()  # of this process; replace by the device's bytes in use and at the peak

    # ---- what a device adds ----------------------------------------------------------------------------------------------------------

    def record(self, work: Work, say: Callable[[str], None]) -> Callable[[], None] | None:
        return device.captured(work)

    def out_of_memory(self, error: BaseException) -> tuple[int, int] | None:
        return device.shortage(error)

    # ---- kernels ---------------------------------------------------------------------------------------------------------------------

    # Replace this kernel by yours. A kernel passes what it does not cover to `super()`, which has the reference; it writes `out` if that is
    # given, and never writes its inputs.

    def swiglu(self, gate_up: Array, limit: float = 0.0, out: Array | None = None) -> Array:
        if limit:  # the clipped form of gpt-oss
            return super().swiglu(gate_up, limit, out)
        rows = self.contiguous(self.rows(gate_up))  # [..., 2H] -> [N, 2H]
        y = self.xp.empty((rows.shape[0], rows.shape[1] // 2), dtype=rows.dtype)
        device.launch(SWIGLU, "swiglu", len(rows), rows, y)
        return self.store(self.xp.reshape(y, (*gate_up.shape[:-1], y.shape[1])), out)


def backend_class() -> type[Backend]:
    """Return the class, which needs no device: `minimoe backends` lists its kernels where `backend` fails."""
    return PlaceholderBackend


def backend() -> Backend:
    """Return the backend. If its device is absent, raise `minimoe.backend.BackendUnavailable` with the reason instead."""
    return PlaceholderBackend()
