"""The fast CPU backend: kernels and a matrix product compiled by Numba, which share their rows out over threads.

`kernel.py` compiles and calls kernels, `pool.py` has the threads, `gemm.py` the matrix product, `blas.py` those of libraries; each topic
of the contract has its own file. Arrays are NumPy arrays. Overrides compute in float32 and pass other dtypes to the reference.
"""

import gc
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from minimoe.backend import Array, Backend, BackendUnavailable, kernel_names, overridden
from minimoe.config import Config
from minimoe_numba.activation import FastActivation
from minimoe_numba.ahead import prepare
from minimoe_numba.attention import FastAttention
from minimoe_numba.blas import find_blas
from minimoe_numba.creation import Namespace, contiguous
from minimoe_numba.embedding import FastEmbedding
from minimoe_numba.expert import FastExpert
from minimoe_numba.gating import FastGating
from minimoe_numba.linear import FastLinear
from minimoe_numba.loss import FastLoss
from minimoe_numba.machine import machine
from minimoe_numba.news import news, to_stderr
from minimoe_numba.norm import FastNorm
from minimoe_numba.optimizer import FastOptimizer
from minimoe_numba.random import FastRandom
from minimoe_numba.rope import FastRope
from minimoe_numba.tape import written
from minimoe_numba.traced import recorder, traced
from minimoe_numpy.memory import keep_freed_memory

__all__ = ["NumbaBackend", "backend", "backend_class"]

PRODUCTS = frozenset({"linear", "linear_dx", "linear_dw", "grouped_matmul", "grouped_matmul_dw"})  # nothing but a library's product


class NumbaBackend(
    FastNorm, FastActivation, FastRope, FastLinear, FastAttention, FastGating, FastExpert, FastLoss, FastEmbedding, FastRandom,
    FastOptimizer,
):  # fmt: skip
    """NumPy arrays with kernels compiled by Numba."""

    name = "numba"
    xp: Any = Namespace()
    warm_up = 1

    def __init__(self) -> None:
        product = find_blas()
        if product is not None and not product.own:
            self.library = PRODUCTS

    def tell(self, listener: Callable[[str], None] | None) -> None:
        news.listener = listener or to_stderr

    def prepare(self, config: Config) -> None:
        prepare(config)

    def use_threads(self, count: int) -> None:
        machine().use_threads(count)

    def from_host(self, array: np.ndarray[Any, Any]) -> Array:
        if recorder.tape is not None:
            recorder.tape.refuse("an array came from the host")
        return traced(np.array(array, order="C", copy=True))

    def adopt(self, array: np.ndarray[Any, Any]) -> Array:
        return traced(array)

    def to_host(self, array: Array) -> np.ndarray[Any, Any]:
        if recorder.tape is not None:
            recorder.tape.refuse("an array was copied to the host")
        return np.asarray(array)

    def host_view(self, array: Array) -> np.ndarray[Any, Any] | None:
        return None if recorder.tape is not None or not isinstance(array, np.ndarray) else np.asarray(array)

    def contiguous(self, x: Array) -> Array:
        return contiguous(x)

    def record(self, work: Callable[[], None], say: Callable[[str], None]) -> Callable[[], None] | None:
        with written(lambda: machine().pool) as tape:
            work()
        if tape.why_not:
            say(tape.why_not)
            return None
        return tape.again()


NumbaBackend.proven = {kernel: "on x86-64, by the tests of every commit" for kernel in kernel_names() if overridden(NumbaBackend, kernel)}


def backend_class() -> type[Backend]:
    """Return the class; its kernels can be listed without compiling them."""
    return NumbaBackend


def backend() -> Backend:
    """Return the Numba backend. Raises BackendUnavailable if NUMBA_DISABLE_JIT keeps Numba from compiling."""
    if numba.config.DISABLE_JIT:
        raise BackendUnavailable("backend numba: NUMBA_DISABLE_JIT is set, and its kernels run only when they are compiled: unset it")
    keep_freed_memory()
    gc.freeze()  # Numba's hundred thousand objects live to the end: no later collection needs to visit them
    return NumbaBackend()
