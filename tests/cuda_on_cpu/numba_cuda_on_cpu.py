"""The backend `numba-cuda` without a card: its host code on NumPy's arrays, its kernels run on the processor from LLVM code."""

from cuda_on_cpu.arrays import HostArrays
from cuda_on_cpu.numba_cpu import NumbaOnCpu

from minimoe_numba_cuda.kernels import NumbaCudaKernels


class NumbaCudaOnCpu(NumbaCudaKernels, HostArrays):
    """All kernels of the backend; float64 goes to the references, as on a card."""

    dtypes = ("float32", "float64")

    def __init__(self, order: str = "forward") -> None:
        super().__init__(NumbaOnCpu(order))
