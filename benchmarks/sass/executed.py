"""Executes launches on the PTX machine (tests/ptx_machine), which counts what warps do: instructions, sectors, bank conflicts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.sass.built import numba_ptx
from benchmarks.sass.launches import Launch, types_of
from minimoe_cupy.loader import Source
from tests.ptx_machine.machine import Module
from tests.ptx_machine.numba_on_ptx import DTYPES, flat
from tests.ptx_machine.nvrtc import compile_ptx

ARCHITECTURE = "sm_90a"


class Machine:
    """Compiles each kernel to PTX once, and runs launches, with the blocks of each in so many threads."""

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self.modules: dict[Any, tuple[Module, dict[str, str]]] = {}

    def run(self, launch: Launch) -> None:
        """Executes a launch on its arrays, and puts the counters into it."""
        if launch.source is not None:
            module, lowered = self._of_source(launch.source)
            name, args = lowered[launch.kernel], launch.args
        else:
            module, args = self._of_function(launch)
            (name,) = module.kernels
        options = {"shared": launch.shared, "threads": self.threads, "count": True, "title": launch.kernel}
        launch.counters = module.launch(name, launch.grid, launch.block, args, **options)

    def _of_source(self, source: Source) -> tuple[Module, dict[str, str]]:
        if source not in self.modules:
            ptx, lowered = compile_ptx(source.path, source.names, source.architecture or ARCHITECTURE, lineinfo=False)
            self.modules[source] = Module(ptx), lowered
        return self.modules[source]

    def _of_function(self, launch: Launch) -> tuple[Module, list[Any]]:
        kinds = types_of(launch.args)
        key = launch.function, kinds
        if key not in self.modules:
            self.modules[key] = Module(numba_ptx(launch.function, kinds, ARCHITECTURE)), {}
        return self.modules[key][0], words(launch.args, kinds)


def words(args: Sequence[Any], kinds: Sequence[Any]) -> list[Any]:
    """A kernel's arguments as Numba passes them."""
    found: list[Any] = []
    for argument, kind in zip(args, kinds, strict=True):
        found += flat(argument) if isinstance(argument, np.ndarray) else [DTYPES[str(kind)](argument)]
    return found
