"""The backend on a card: CuPy's arrays under the kernels, launched by Numba on CuPy's current stream."""

from typing import Any

import cupy
from numba.cuda.core import config

from minimoe_cupy.arrays import CupyArrays
from minimoe_numba_cuda.kernels import NumbaCudaKernels
from minimoe_numba_cuda.launcher import Launcher, stream_at


class NumbaCudaBackend(NumbaCudaKernels, CupyArrays):
    """All kernels, on the current device."""

    dtypes = ("float32", "float64")  # type: ignore[assignment]  # fewer than CuPy's

    def __init__(self) -> None:
        super().__init__(Launcher(cupy.empty(1)))
        config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # a small model has few rows

    def _stream(self) -> Any:
        return stream_at(cupy.cuda.get_current_stream().ptr)
