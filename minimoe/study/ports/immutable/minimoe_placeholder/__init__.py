"""The backend `placeholder` of minimoe: a library whose arrays cannot be written. Every kernel is minimoe's reference.

`standin.py`, immutable arrays over NumPy, stands in for your library, so that everything here works from the first minute. Replace it
function by function; the comments say with what. After each, run `minimoe backends check placeholder --kernel NAME`. At the end, delete
`standin.py`. minimoe writes into arrays: `minimoe.functional` keeps yours in holders, and what you write here never sees one.
"""

from typing import Any

import numpy as np

from minimoe.backend import Array, Backend, load
from minimoe.functional import FunctionalBackend, on_library_arrays

from . import standin as library  # replace by your library: import jax.numpy as library


class Namespace:
    """Your library's namespace, with functions of the Array API standard where the library's differ.

    `minimoe.testing.array_layer.XP_FUNCTIONS` lists what minimoe uses; `minimoe backends check placeholder` names what is missing.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(library, name)  # what the library has under the standard's name

    # Libraries that do not follow the standard often lack these. Remove those that yours has, and add those that it lacks.

    @staticmethod
    def astype(x: Any, dtype: Any, *, copy: bool = True) -> Any:
        return x.astype(dtype)  # an immutable array need not be copied

    @staticmethod
    def concat(arrays: Any, *, axis: int = 0) -> Any:
        return library.concatenate(arrays, axis=axis)

    @staticmethod
    def cumulative_sum(x: Any) -> Any:
        return library.cumsum(x, axis=0)  # of a vector; its dtype is x's

    @staticmethod
    def permute_dims(x: Any, axes: tuple[int, ...]) -> Any:
        return library.transpose(x, axes)


class PlaceholderBackend(FunctionalBackend):
    """Holders of one library's immutable arrays. What the methods take and return are the library's own arrays."""

    name = "placeholder"
    dtypes = ("float32", "float64")  # replace by those that the device computes; float32 alone is enough
    plain = Namespace()

    def from_numpy(self, array: np.ndarray[Any, Any]) -> Any:
        return library.array(array)  # replace by the library's copy of a NumPy array: jnp.array(array, copy=True)

    def to_numpy(self, x: Any) -> np.ndarray[Any, Any]:
        return np.asarray(x)  # right for every library whose arrays NumPy reads

    def with_part(self, x: Any, index: Any, part: Any) -> Any:
        return library.with_part(x, index, part)  # replace by the library's: x.at[index].set(part)

    def with_added(self, x: Any, index: Any, rows: Any) -> Any:
        # Replace by the library's: x.at[index].add(rows). Equal rows add in order, and a negative index counts from the end.
        return library.with_added(x, index, rows)

    @on_library_arrays
    def erf(self, x: Array) -> Array:
        return library.erf(x)  # replace by the library's: jax.scipy.special.erf(x)

    def compile(self, function: Any) -> Any:
        # Replace by the library's compiler: jax.jit(function). Without one, delete this method, and steps stay plain. If the compiled
        # function takes over the buffers of its first argument (donate_argnums=0), `copied` must return a copy.
        return function

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
