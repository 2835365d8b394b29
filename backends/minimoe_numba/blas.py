"""The matrix product by its address, with the arguments of cblas_sgemm: kernels call it without Python, on one thread, many at once.

minimoe's own (`gemm.py`) is taken on processors with AVX-512, where it was faster than OpenBLAS and MKL at the models' shapes, and with
AVX2, where it was as fast (`benchmarks/blas.py` tells for a machine); its results do not depend on the number of threads. Elsewhere
OpenBLAS, which comes with NumPy's wheels. MKL (`pip install 'minimoe[mkl]'`) is taken where it is installed and the processor is Intel's.
`MINIMOE_BLAS`, one of minimoe, openblas and mkl, decides otherwise.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from minimoe.errors import UserError
from minimoe_numba.gemm import machine_code
from minimoe_numba.vector import FITS

OPENBLAS_NAMES = [("scipy_cblas_sgemm64_", "openblas_set_num_threads_local"), ("cblas_sgemm64_", "openblas_set_num_threads_local64_"),
                  ("scipy_cblas_sgemm", "openblas_set_num_threads_local"), ("cblas_sgemm", "openblas_set_num_threads_local")]  # fmt: skip
SEQUENTIAL, ANY_BRANCH = 1, 2  # MKL's threading layer without threads; results that do not depend on where an array lies


class Blas:
    """A product. `limit(n)` sets the threads of a library's calls and gives what they were; None where a call has one anyway."""

    def __init__(self, name: str, address: Callable[[], int], limit: Callable[[int], int] | None = None, own: bool = False) -> None:
        self.name, self.address, self.limit, self.own = name, address, limit, own

    @cached_property
    def sgemm(self) -> int:
        """The address of the function; our own is compiled when it is first asked for."""
        return self.address()


def find_blas() -> Blas | None:
    """The product to use here; None where there is none that can be called by address (NumPy then multiplies). Raises UserError."""
    wanted = os.environ.get("MINIMOE_BLAS", "")
    if wanted not in ("", "minimoe", "mkl", "openblas"):
        raise UserError(f"MINIMOE_BLAS={wanted!r}: minimoe, openblas or mkl")
    if wanted == "mkl" or (not wanted and made_by_intel()):
        found = mkl()
        if found is not None:
            return found
        if wanted:
            raise UserError("MINIMOE_BLAS=mkl: MKL is not installed here: pip install 'minimoe[mkl]'")
    return own_product() if wanted == "minimoe" or (not wanted and FITS) else openblas()


def own_product() -> Blas:
    """The one that is compiled for this processor."""
    return Blas("minimoe", lambda: int(machine_code().address), own=True)


def openblas() -> Blas | None:
    """The OpenBLAS that NumPy has loaded."""
    np.zeros((1, 1)) @ np.zeros((1, 1))
    for facts in threadpool_info():
        if facts["internal_api"] != "openblas":
            continue
        library = ctypes.CDLL(facts["filepath"])
        for product, limit in OPENBLAS_NAMES:
            if hasattr(library, product) and hasattr(library, limit) and integers_fit(product):
                return Blas(f"OpenBLAS {facts['version']}", partial(at, library[product]), library[limit])
    return None


def mkl() -> Blas | None:
    """MKL's own wheel, without threads of its own."""
    try:
        listed = files("mkl") or []
    except PackageNotFoundError:
        return None
    for file in listed:
        path = Path(str(file.locate())).resolve()
        if path.name.startswith(("libmkl_rt.", "mkl_rt.")) and integers_fit("cblas_sgemm"):
            library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            library.MKL_Set_Threading_Layer(SEQUENTIAL)
            library.MKL_CBWR_Set(ANY_BRANCH)
            return Blas("MKL", partial(at, library.cblas_sgemm))
    return None


def at(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def integers_fit(name: str) -> bool:
    """Kernels pass 64-bit integers: to a library of 32 only where an argument on the stack has 8 bytes. Not so on Apple's processors."""
    return name.endswith("64_") or sys.platform != "darwin"


def made_by_intel() -> bool:
    """Is the processor Intel's?"""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        return "GenuineIntel" in cpuinfo.read_text()
    return "GenuineIntel" in os.environ.get("PROCESSOR_IDENTIFIER", "")  # Windows
