"""The backend `cupy` without a card: its host code on NumPy's arrays, its kernels compiled by g++ and run on the processor."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from cuda_on_cpu.arrays import HostArrays
from cuda_on_cpu.cpu_cuda import CudaOnCpu, Launch

from minimoe_cupy import CudaKernels, sources


@cache
def all_names(path: Path) -> tuple[str, ...]:
    """All kernels that the backend needs of a `.cu` file: one library has them, so that g++ compiles the file once."""
    return tuple(name for source in sources() if source.path == path for name in source.names)


class CpuLoader:
    """Compiles with g++; kernels run with their threads and blocks in one of ORDERS."""

    def __init__(self, order: str = "forward", options: Sequence[str] = ()) -> None:
        self.order, self.options = order, options

    def __call__(self, path: Path, names: Sequence[str], architecture: str | None = None) -> Callable[[str], Launch]:
        known = all_names(path)
        wanted = known if set(names) <= set(known) else names
        return CudaOnCpu(path, wanted, self.order, self.options).kernel


class CupyOnCpu(CudaKernels, HostArrays):
    """All kernels of the backend; float64 goes to the references, as on a card."""

    def __init__(self, order: str = "forward") -> None:
        super().__init__(CpuLoader(order))
