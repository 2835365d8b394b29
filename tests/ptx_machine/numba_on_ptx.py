"""The backend `numba-cuda` without a card: its host code on NumPy's arrays, its kernels compiled by libNVVM and executed by the machine.

    run = NumbaOnPtx(seed=7)
    run(kernel)[blocks, threads, 0, shared_bytes](x, y, np.int32(n))

A kernel is a lazy `@cuda.jit` function. Numba-CUDA compiles it to the PTX that it gives a card's driver.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

from minimoe_numba_cuda.kernels import NumbaCudaKernels

from .arrays import HostArrays
from .machine import Module

CAPABILITY = (9, 0)
DTYPES = {
    "float32": np.float32,
    "float64": np.float64,
    "int32": np.int32,
    "uint32": np.uint32,
    "int64": np.int64,
    "uint64": np.uint64,
    "boolean": np.bool_,
    "bool": np.bool_,
}


@cache
def compile_ptx(function: Any, kinds: tuple[Any, ...], fastmath: bool = False, capability: tuple[Any, ...] = CAPABILITY) -> str:
    """Return the PTX of a kernel for the types of its arguments, which are Numba's."""
    from cuda.bindings.nvvm import nvvmError
    from numba import cuda
    from numba.cuda import dispatcher, types

    device = SimpleNamespace(compute_capability=capability)
    compiled = partial(cuda.compile, function, types.void(*kinds), device=False, fastmath=fastmath, cc=capability, abi="numba")
    # functions of the device that a kernel calls are compiled for "the current device", of which there is none
    with patch.object(dispatcher, "get_current_device", lambda: device):
        try:
            ptx, _ = compiled(lineinfo=True)
        except nvvmError:  # libNVVM refuses the line numbers of some kernels, which are not needed
            ptx, _ = compiled(lineinfo=False)
    return str(ptx)


@cache
def module(function: Any, kinds: tuple[Any, ...], fastmath: bool) -> Module:
    return Module(compile_ptx(function, kinds, fastmath))


class NumbaOnPtx:
    """Runs kernels in the schedule of a seed (`Module.launch`)."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, kernel: Any) -> "Configured":
        return Configured(kernel, self.seed)


class Configured:
    """A kernel that takes its launch shape in brackets, as in numba-cuda: [blocks, threads, stream, shared bytes]."""

    def __init__(self, kernel: Any, seed: int) -> None:
        self.kernel, self.seed = kernel, seed

    def __getitem__(self, shape: tuple[Any, ...]) -> Callable[..., None]:
        grid, block = (np.atleast_1d(size).tolist() for size in shape[:2])
        shared = int(shape[3]) if len(shape) > 3 else 0
        return lambda *args: self._run(grid, block, shared, args)

    def _run(self, grid: Any, block: Any, shared: int, args: tuple[Any, ...]) -> None:
        from numba.cuda.typing.typeof import typeof

        function = self.kernel.py_func
        kinds = tuple(typeof(argument) for argument in args)
        found = module(function, kinds, bool(self.kernel.targetoptions.get("fastmath")))
        (name,) = found.kernels
        words: list[Any] = []
        names: list[str] = []
        for parameter, argument, kind in zip(inspect.signature(function).parameters, args, kinds, strict=True):
            given = flat(argument) if isinstance(argument, np.ndarray) else [DTYPES[str(kind)](argument)]
            words += given
            names += [parameter] * len(given)
        found.launch(name, grid, block, words, shared, self.seed, title=function.__name__, names=names)


def flat(array: Any) -> list[Any]:
    """Return an array as Numba passes it: two pointers that are null, its size, its element's, the array, shape, strides."""
    numbers = (array.size, array.itemsize), (*array.shape, *array.strides)
    return [np.int64(0), np.int64(0), *map(np.int64, numbers[0]), array, *map(np.int64, numbers[1])]


class NumbaCudaOnPtx(NumbaCudaKernels, HostArrays):
    """All kernels of the backend; float64 goes to the references, as on a card."""

    dtypes = ("float32", "float64")

    def __init__(self, seed: int = 0) -> None:
        super().__init__(NumbaOnPtx(seed))
