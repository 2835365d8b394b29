"""The backend `cupy` without a card: its host code on NumPy's arrays, its kernels compiled by NVRTC and executed by the machine."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from minimoe_cupy import CudaKernels, sources
from minimoe_cupy.launch import parameters
from minimoe_cupy.loader import Launch, Source

from .arrays import HostArrays
from .machine import Module
from .nvrtc import compile_ptx

HOPPER = "sm_90a"  # what a card of compute capability 9.0 gets, for sources that name no architecture too


@cache
def all_names(path: Path) -> tuple[str, ...]:
    """Return all kernels that the backend needs of a `.cu` file, so that it is compiled once."""
    return tuple(name for source in sources() if source.path == path for name in source.names)


@cache
def module(path: Path, names: tuple[str, ...], architecture: str) -> tuple[Module, dict[str, str]]:
    """Return a `.cu` file's kernels on the machine, and their names in PTX by their C++ names."""
    ptx, lowered = compile_ptx(path, names, architecture)
    return Module(ptx), lowered


class PtxLoader:
    """Compiles with NVRTC; kernels run in the schedule of a seed (`Module.launch`)."""

    def __init__(self, seed: int = 0, architecture: str = HOPPER) -> None:
        self.seed, self.architecture = seed, architecture

    def __call__(self, path: Path, names: Sequence[str], architecture: str | None = None) -> Callable[[str], Launch]:
        known = all_names(path)
        wanted = known if set(names) <= set(known) else tuple(names)
        found, lowered = module(path, wanted, architecture or self.architecture)

        def kernel(name: str) -> Launch:
            declared = (
                [parameter.name for parameter in parameters(Source(path.name, wanted), name)] if path.parent.name == "kernels" else None
            )

            def launch(grid: Sequence[int], block: Sequence[int], args: Sequence[Any], shared_mem: int = 0) -> None:
                title = f"{name} of {path.name}"
                found.launch(lowered[name], grid, block, args, shared_mem, self.seed, title=title, names=declared)

            return launch

        return kernel


class CupyOnPtx(CudaKernels, HostArrays):
    """All kernels of the backend; float64 goes to the references, as on a card."""

    def __init__(self, seed: int = 0, architecture: str = HOPPER) -> None:
        super().__init__(PtxLoader(seed, architecture))
