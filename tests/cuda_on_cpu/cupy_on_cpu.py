"""The backend `cupy` without a card: its host code on NumPy's arrays, its kernels compiled by g++ and run on the processor."""

from collections.abc import Callable, Sequence
from pathlib import Path

from cuda_on_cpu.arrays import HostArrays
from cuda_on_cpu.cpu_cuda import CudaOnCpu, Launch

from minimoe_cupy import CudaKernels


class CpuLoader:
    """g++, with threads and blocks in one of ORDERS."""

    def __init__(self, order: str = "forward", options: Sequence[str] = ()) -> None:
        self.order, self.options = order, options

    def __call__(self, path: Path, names: Sequence[str], architecture: str | None = None) -> Callable[[str], Launch]:
        return CudaOnCpu(path, names, self.order, self.options).kernel


class CupyOnCpu(CudaKernels, HostArrays):
    """All of it; float64 goes to the references, as on a card."""

    def __init__(self, order: str = "forward") -> None:
        super().__init__(CpuLoader(order))
