"""Runs a mutant of a kernel of the backend `cupy` on the PTX machine: the cases of the conformance suite that reach it, until one fails."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ptx_machine.arrays import BFLOAT16, HostArrays
from ptx_machine.build import library
from ptx_machine.cupy_on_ptx import HOPPER
from ptx_machine.machine import Module
from ptx_machine.nvrtc import compile_ptx

from minimoe.testing import cases
from minimoe_cupy import CudaKernels
from minimoe_cupy.grouped import TILINGS, WGMMA, Tiling
from minimoe_cupy.loader import KERNELS, Launch

from .deep import DEEP

DTYPES = {"float32": np.float32, "bfloat16": BFLOAT16}
MOST_INSTRUCTIONS = 1 << 24  # of a block: a mutant that loops for ever ends soon


@dataclass(frozen=True)
class Target:
    """What a mutant is run with, in one dtype: the contract's kernels that reach the file, and checks of deep.py, perhaps on one tiling."""

    kernels: tuple[str, ...]
    dtype: str = "float32"
    deep: tuple[str, ...] = ()
    tiling: str = ""  # of products: large, small, or wgmma


class MutantLoader:
    """Compiles from a folder in which a file may be changed, one kernel at a time; `change` may change a kernel's PTX as well."""

    def __init__(self, folder: Path, seed: int, change: Callable[[str, str], str] | None = None) -> None:
        self.folder, self.seed, self.change = folder, seed, change

    def __call__(self, path: Path, names: Sequence[str], architecture: str | None = None) -> Callable[[str], Launch]:
        def kernel(name: str) -> Launch:
            ptx, lowered = compile_ptx(self.folder / path.name, [name], architecture or HOPPER)
            module = Module(self.change(ptx, lowered[name]) if self.change else ptx)

            def launch(grid: Sequence[int], block: Sequence[int], args: Sequence[Any], shared_mem: int = 0) -> None:
                title = f"{name} of {path.name}"
                module.launch(lowered[name], grid, block, args, shared_mem, self.seed, title=title, most_instructions=MOST_INSTRUCTIONS)

            return launch

        return kernel


class Mutated(CudaKernels, HostArrays):
    """The backend with a mutated kernel."""

    def __init__(self, loader: MutantLoader, tiling: Tiling | None = None) -> None:
        super().__init__(loader)
        self.tiling = tiling

    def _tiling(self, dtype: Any, vector: bool, *others: Any) -> Any:
        return self.tiling if self.tiling and vector else super()._tiling(dtype, vector, *others)


def tiling_of(target: Target) -> Tiling | None:
    large, small, _ = TILINGS[np.dtype(DTYPES[target.dtype])]
    return {"large": large, "small": small, "wgmma": WGMMA[1]}.get(target.tiling)


def reached(backend: Mutated, target: Target) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the cases that run a target, with their names: the suite's, which are small, then those of deep.py."""
    for kernel in target.kernels:
        for case in cases(backend, level="kernels", kernel=kernel):
            if f"[{target.dtype}]" in case.name and ", large" not in case.name:
                yield case.name, case.run
    for name in target.deep:
        yield f"deep {name} [{target.dtype}]", partial(DEEP[name], backend, np.dtype(DTYPES[target.dtype]))


def found(
    target: Target, file: str = "", text: str = "", change: Callable[[str, str], str] | None = None, seeds: Sequence[int] = (1,)
) -> str:
    """Return what finds a mutant: a line of the machine, of a case, or of a compiler; "" if nothing does.

    `text` takes the place of a file of the kernels, or `change` makes other PTX of a kernel's PTX and name.
    """
    library()  # raises here if it cannot be built: within a trial that would pass for a fault found
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(KERNELS, Path(scratch) / "kernels"))
        if file:
            (folder / file).write_text(text, encoding="utf-8")
        for seed in seeds:
            backend = Mutated(MutantLoader(folder, seed, change), tiling_of(target))
            for name, run in reached(backend, target):
                try:
                    with np.errstate(all="ignore"):
                        run()
                except Exception as error:
                    return f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""
