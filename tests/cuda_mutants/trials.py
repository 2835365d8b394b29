"""Runs a mutant of a kernel of the backend `cupy` on the PTX machine: the cases of the conformance suite that reach it, until one fails."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ptx_machine.arrays import HostArrays
from ptx_machine.cupy_on_ptx import HOPPER
from ptx_machine.machine import Module
from ptx_machine.nvrtc import compile_ptx

from minimoe.testing import cases
from minimoe.testing.conformance import Case
from minimoe_cupy import CudaKernels
from minimoe_cupy.grouped import WGMMA
from minimoe_cupy.loader import KERNELS, Launch

MOST_INSTRUCTIONS = 1 << 24  # of a block: a mutant that loops for ever ends soon


@dataclass(frozen=True)
class Target:
    """What a mutant is run with: the contract's kernels that reach the file, in one dtype, perhaps on one tiling."""

    kernels: tuple[str, ...]
    dtype: str = "float32"
    wgmma: bool = False


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

    def __init__(self, loader: MutantLoader, wgmma: bool = False) -> None:
        super().__init__(loader)
        self.wgmma = wgmma

    def _tiling(self, dtype: Any, vector: bool, *others: Any) -> Any:
        return WGMMA[1] if self.wgmma and vector else super()._tiling(dtype, vector, *others)


def reached(backend: Mutated, target: Target) -> Iterator[Case]:
    """Yield the cases that run a target, small ones first."""
    for kernel in target.kernels:
        for case in cases(backend, level="kernels", kernel=kernel):
            if f"[{target.dtype}]" in case.name and ", large" not in case.name:
                yield case


def found(
    target: Target, file: str = "", text: str = "", change: Callable[[str, str], str] | None = None, seeds: Sequence[int] = (1,)
) -> str:
    """Return what finds a mutant: a line of the machine, of a case, or of a compiler; "" if nothing does.

    `text` takes the place of a file of the kernels, or `change` makes other PTX of a kernel's PTX and name.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(KERNELS, Path(scratch) / "kernels"))
        if file:
            (folder / file).write_text(text, encoding="utf-8")
        for seed in seeds:
            backend = Mutated(MutantLoader(folder, seed, change), target.wgmma)
            for case in reached(backend, target):
                try:
                    with np.errstate(all="ignore"):
                        case.run()
                except Exception as error:
                    return f"{case.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""
