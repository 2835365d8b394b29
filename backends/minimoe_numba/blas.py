"""Chooses the matrix product. Kernels call it by its address, with cblas_sgemm's arguments and without Python, in many threads at once.

minimoe's own product (`gemm.py`) is used on processors with AVX-512, where it was faster than OpenBLAS and MKL at the models' shapes, and
with AVX2, where it was as fast (`python -m benchmarks.blas` measures it); its results do not depend on the number of threads. Other
processors use OpenBLAS, which comes with NumPy's wheels. MKL (`pip install 'minimoe[mkl]'`) is used on Intel processors if it is
installed. `MINIMOE_BLAS`, one of minimoe, openblas and mkl, overrides the choice.
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
from minimoe.hints import install
from minimoe_numba.gemm import machine_code
from minimoe_numba.vector import FITS

OPENBLAS_NAMES = [("scipy_cblas_sgemm64_", "openblas_set_num_threads_local"), ("cblas_sgemm64_", "openblas_set_num_threads_local64_"),
                  ("scipy_cblas_sgemm", "openblas_set_num_threads_local"), ("cblas_sgemm", "openblas_set_num_threads_local")]  # fmt: skip
SEQUENTIAL, ANY_BRANCH = 1, 2  # MKL's sequential threading layer; results that do not depend on the alignment of an array


class Blas:
    """A matrix product. `limit(n)` sets the threads per call and returns the previous number; None if a call always has one."""

    def __init__(self, name: str, address: Callable[[], int], limit: Callable[[int], int] | None = None, own: bool = False) -> None:
        self.name, self.address, self.limit, self.own = name, address, limit, own

    @cached_property
    def sgemm(self) -> int:
        """The address of the function. minimoe's own is compiled when this is first read."""
        return self.address()


def find_blas() -> Blas | None:
    """Return the product to use on this machine, or None if none can be called by address (NumPy then multiplies). Raises UserError."""
    wanted = os.environ.get("MINIMOE_BLAS", "")
    if wanted not in ("", "minimoe", "mkl", "openblas"):
        raise UserError(f"MINIMOE_BLAS={wanted!r}: minimoe, openblas or mkl")
    if wanted == "mkl" or (not wanted and made_by_intel()):
        found = mkl()
        if found is not None:
            return found
        if wanted:
            raise UserError(f"MINIMOE_BLAS=mkl: MKL is not installed here: {install('mkl')}")
    return own_product() if wanted == "minimoe" or (not wanted and FITS) else openblas()


def own_product() -> Blas:
    """Return minimoe's own product, compiled for this processor."""
    return Blas("minimoe", lambda: int(machine_code().address), own=True)


def openblas() -> Blas | None:
    """Return the OpenBLAS that NumPy has loaded, if any."""
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
    """Return the MKL of the package `mkl`, if it is installed, set to one thread per call."""
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
    """True if kernels can pass this function 64-bit integers.

    A library of 32-bit integers takes them if each argument on the stack has 8 bytes, which is not so on Apple's processors.
    """
    return name.endswith("64_") or sys.platform != "darwin"


def made_by_intel() -> bool:
    """True if this is an Intel processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        return "GenuineIntel" in cpuinfo.read_text()
    return "GenuineIntel" in os.environ.get("PROCESSOR_IDENTIFIER", "")  # Windows
