"""JAX's arrays as a minimoe backend: the array layer over immutable arrays, and steps that XLA compiles. An example of backends/README.md.

`JaxBackend("gpu")` names the device, or MINIMOE_JAX_DEVICE does; without either, JAX chooses (its own JAX_PLATFORMS limits what it sees).
JAX's `grad` and `vmap` are not used, since minimoe has its own autograd.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minimoe.backend import Array, Backend, BackendUnavailable, load
from minimoe.caches import private_folder
from minimoe.functional import FunctionalBackend, on_library_arrays
from minimoe.functional.backend import Pure

Value = Any  # jax.Array


class JaxBackend(FunctionalBackend):
    """JAX on one device. Raises `BackendUnavailable` if this machine, or this JAX, has no such device.

    It sets four of JAX's options for the whole process: 64-bit numbers, since minimoe draws random numbers in int64; products of float32
    in float32, which GPUs and TPUs shorten otherwise; the device on which new arrays are made; and, unless one is set, the folder in which
    compiled steps are kept.
    """

    name = "jax"
    library = frozenset({"grouped_matmul"})
    dtypes = ("float32", "float64")
    plain = jnp

    def __init__(self, device: str = "") -> None:
        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_default_matmul_precision", "highest")
        try:
            self.device = jax.devices(device or None)[0]
        except RuntimeError as error:
            raise BackendUnavailable(f"backend jax: no {device or 'device'} here for JAX {jax.__version__}") from error
        jax.config.update("jax_default_device", self.device)
        if jax.config.values["jax_compilation_cache_dir"] is None and (folder := private_folder("jax")):  # compiled steps are code
            jax.config.update("jax_compilation_cache_dir", str(folder))
        super().__init__()

    # ---- what FunctionalBackend asks for -------------------------------------------------------------------------------------------

    def from_numpy(self, array: np.ndarray[Any, Any]) -> Value:
        return jnp.array(array, copy=True)

    def to_numpy(self, x: Value) -> np.ndarray[Any, Any]:
        return np.asarray(x)

    def with_part(self, x: Value, index: Any, part: Any) -> Value:
        return x.at[index].set(jnp.asarray(part, dtype=x.dtype))

    def with_added(self, x: Value, index: Value, rows: Value) -> Value:
        return x.at[index].add(rows)

    def copied(self, x: Value) -> Value:
        return jnp.array(x, copy=True)

    @on_library_arrays
    def erf(self, x: Value) -> Value:
        return jax.scipy.special.erf(x)

    def synchronize(self) -> None:
        jax.block_until_ready(jax.live_arrays())

    def memory(self) -> dict[str, int]:
        stats = self.device.memory_stats()
        if stats is None:  # a CPU: of the process
            return load("numpy").memory()
        return {"used": stats["bytes_in_use"], "peak": stats["peak_bytes_in_use"]}

    def compile(self, function: Pure) -> Pure | None:
        return jax.jit(function, donate_argnums=0)

    # ---- a kernel of its own -------------------------------------------------------------------------------------------------------

    @on_library_arrays
    def grouped_matmul(self, x: Array, weight: Array, offsets: Array, transpose: bool = False, out: Array | None = None) -> Array:
        used = (jnp.arange(x.shape[0]) < offsets[-1])[:, None]  # rows past the last offset may hold anything
        rows = jnp.where(used, x, 0)
        y = jax.lax.ragged_dot(rows, weight if transpose else jnp.swapaxes(weight, 1, 2), jnp.diff(offsets))
        return jnp.where(used, y, 0)


def backend_class() -> type[Backend]:
    """Return the class, which needs no device: `minimoe backends` lists it if `backend` fails."""
    return JaxBackend


def backend() -> Backend:
    """Return the backend on the device that MINIMOE_JAX_DEVICE names, by default the one that JAX prefers."""
    return JaxBackend(os.environ.get("MINIMOE_JAX_DEVICE", ""))
