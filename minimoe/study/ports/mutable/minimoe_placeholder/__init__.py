"""The backend `placeholder` of minimoe: the array layer over a library whose arrays can be written. Every kernel is minimoe's reference.

NumPy stands in for your library, so that everything here works from the first minute. Replace it function by function; the comments
say with what. After each, run `minimoe backends check placeholder --kernel NAME`.
"""

from typing import Any

import numpy as library  # replace by your library: import torch as library
import numpy as np

from minimoe.backend import Array, Backend, load


class Namespace:
    """Your library's namespace, with functions of the Array API standard where the library's differ.

    `minimoe.testing.array_layer.XP_FUNCTIONS` lists what minimoe uses; `minimoe backends check placeholder` names what is missing.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(library, name)  # what the library has under the standard's name

    # Libraries older than the standard often lack these. Remove those that yours has, and add those that it lacks.

    @staticmethod
    def astype(x: Array, dtype: Any, *, copy: bool = True) -> Array:
        return x.astype(dtype, copy=copy)  # replace by the library's cast: x.to(dtype, copy=copy)

    @staticmethod
    def concat(arrays: Any, *, axis: int = 0) -> Array:
        return library.concatenate(arrays, axis=axis)  # replace by the library's: torch.cat

    @staticmethod
    def cumulative_sum(x: Array) -> Array:
        return library.cumsum(x, axis=0)  # of a vector; its dtype is x's

    @staticmethod
    def permute_dims(x: Array, axes: tuple[int, ...]) -> Array:
        return library.transpose(x, axes)  # replace by the library's: torch.permute


class PlaceholderBackend(Backend):
    """Arrays of one library on one device. Slices of an array must be views of it, since parameters lie in flat buffers."""

    name = "placeholder"
    dtypes = ("float32", "float64")  # replace by those that the device computes; float32 alone is enough
    xp: Any = Namespace()

    def from_host(self, array: np.ndarray[Any, Any]) -> Array:
        return np.array(array, order="C", copy=True)  # replace by the copy to the device: torch.from_numpy(...).to(device)

    def to_host(self, array: Array) -> np.ndarray[Any, Any]:
        return np.array(array)  # replace by the copy to the host: array.cpu().numpy()

    def scatter_add(self, inout_target: Array, index: Array, values: Array) -> None:
        # Replace by the library's: target.index_add_(0, index, values). Equal rows add in order, and a negative index counts from the end.
        np.add.at(inout_target, index, values)

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        # 0 - x makes -0.0 tie with 0.0. A library's own top_k is right only if ties go to the lowest index and NaN comes last.
        ids = self.xp.argsort(0.0 - x, axis=-1, stable=True)[..., :k]
        return self.xp.take_along_axis(x, ids, axis=-1), self.xp.astype(ids, self.xp.int32)

    def bincount(self, ids: Array, minlength: int) -> Array:
        counts = self.xp.zeros(minlength, dtype=self.xp.int32)  # right as it is; a library's bincount may read the device on the host
        self.scatter_add(counts, ids, self.xp.ones_like(ids))
        return counts

    def erf(self, x: Array) -> Array:
        return load("numpy").erf(x)  # replace by the library's: torch.erf(x)

    def contiguous(self, x: Array) -> Array:
        return np.ascontiguousarray(x)  # replace by the library's: x.contiguous()

    def synchronize(self) -> None:
        """Wait until the device has finished. NumPy returns when it is done: replace this by the library's wait for its device."""

    def memory(self) -> dict[str, int]:
        return load("numpy").memory()  # of this process; replace by the device's bytes in use and at the peak


def backend_class() -> type[Backend]:
    """Return the class, which needs no device: `minimoe backends` lists its kernels where `backend` fails."""
    return PlaceholderBackend


def backend() -> Backend:
    """Return the backend. If its device is absent, raise `minimoe.backend.BackendUnavailable` with the reason instead."""
    return PlaceholderBackend()
