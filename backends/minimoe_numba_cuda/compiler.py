"""Numba-CUDA's compiler and its types, in one place: where the package is absent, kernels stay plain functions.

They cannot run then, but the backend's class can be made, so that `minimoe backends` lists its kernels in every installation.
"""

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class Absent:
    """What kernels need of Numba-CUDA until they are called."""

    @staticmethod
    def jit(function: F | None = None, **options: Any) -> F | Callable[[F], F]:
        """Returns the function as it is."""
        return (lambda given: given) if function is None else function


try:
    from numba import cuda
    from numba.cuda import float32, int32, int64, libdevice, uint32, uint64
except ImportError:  # the package is absent: Numba alone has an older `numba.cuda`, without these types, or none
    cuda = Absent()
    float32 = int32 = int64 = libdevice = uint32 = uint64 = None

__all__ = ["cuda", "float32", "int32", "int64", "libdevice", "uint32", "uint64"]
