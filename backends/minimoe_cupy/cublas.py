"""Dense products by cuBLAS, called directly: CuPy's own call refuses to be recorded in a CUDA graph, and batches of bfloat16.

Sums are float32 (float64 for float64), never TF32. A handle, a stream's name and a workspace of fixed address for each thread.
"""

import ctypes
import threading
from typing import Any, NamedTuple

import numpy as np

from minimoe.backend import Array
from minimoe_cupy.launch import BFLOAT16, FLOAT32, address

NAMES = ("libcublas.so.13", "libcublas.so.12", "cublas64_13.dll", "cublas64_12.dll")  # CuPy has loaded one of them
DATA = {FLOAT32: 0, np.dtype(np.float64): 1, BFLOAT16: 14}  # cudaDataType_t
COMPUTE_32F, COMPUTE_64F = 68, 70  # cublasComputeType_t
DEFAULT_ALGORITHM = -1
WORKSPACE = 32 * 2**20  # bytes: what cuBLAS recommends for Hopper
KEEP, TURN = 0, 1  # cublasOperation_t


class Operand(NamedTuple):
    """A row-major matrix as cuBLAS, which counts by columns, sees it."""

    operation: int
    address: int
    stride: int


def operand(x: Array) -> Operand | None:
    """x [rows,columns], C-contiguous or a transposed view of such a matrix; None for any other layout."""
    rows, columns = x.shape
    if x.flags.c_contiguous:
        return Operand(KEEP, address(x), max(columns, 1))
    if x.flags.f_contiguous:
        return Operand(TURN, address(x), max(rows, 1))
    return None


def product(a: Array, b: Array, out: Array) -> tuple[Any, ...] | None:
    """What cublasGemmEx is told for out = a b, row-major: out^T = b^T a^T by columns.   a [M,K], b [K,N], out [M,N]

    -> operations of b and a, N, M, K, addresses and strides of b, a and out; None for a layout that it does not take.
    """
    left, right = operand(a), operand(b)
    if left is None or right is None or not out.flags.c_contiguous:
        return None
    (m, k), n = a.shape, b.shape[1]
    return (right.operation, left.operation, n, m, k, right.address, right.stride, left.address, left.stride, address(out), max(n, 1))


class Cublas(threading.local):
    """The library, with a handle of this thread's own."""

    def __init__(self) -> None:
        self.handle = ctypes.c_void_p()
        self.workspace: Any = None

    def _start(self) -> None:
        import cupy
        from cupy_backends.cuda.libs import cublas as loaded  # noqa: F401  its import loads the library

        for name in NAMES:
            try:
                self.library = ctypes.CDLL(name)
                break
            except OSError:
                continue
        else:
            raise RuntimeError(f"cuBLAS was not found under any of {', '.join(NAMES)}")
        self.workspace = cupy.empty(WORKSPACE, dtype=cupy.uint8)
        self._call("cublasCreate_v2", ctypes.byref(self.handle))

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self.library, name)(*args)
        if status:
            raise RuntimeError(f"{name}: cuBLAS gave status {status}")

    def matmul(self, a: Array, b: Array, out: Array) -> bool:
        """out = a b on the current stream; False where it is not for cuBLAS to do (dtype or layout) and nothing was done."""
        import cupy

        told = product(a, b, out) if {a.dtype, b.dtype, out.dtype} <= DATA.keys() and a.dtype == b.dtype == out.dtype else None
        if told is None:
            return False
        if not out.size:
            return True
        if not self.handle:
            self._start()
        operation_b, operation_a, n, m, k, at_b, stride_b, at_a, stride_a, at_out, stride = told
        double = a.dtype == np.float64
        number = ctypes.c_double if double else ctypes.c_float
        one, zero, kind = number(1.0), number(0.0), DATA[a.dtype]
        pointer = ctypes.c_void_p
        self._call("cublasSetStream_v2", self.handle, pointer(cupy.cuda.get_current_stream().ptr))
        self._call("cublasSetWorkspace_v2", self.handle, pointer(self.workspace.data.ptr), ctypes.c_size_t(WORKSPACE))
        self._call(
            "cublasGemmEx", self.handle, operation_b, operation_a, n, m, k, ctypes.byref(one), pointer(at_b), kind, stride_b,
            pointer(at_a), kind, stride_a, ctypes.byref(zero), pointer(at_out), kind, stride, COMPUTE_64F if double else COMPUTE_32F,
            DEFAULT_ALGORITHM,
        )  # fmt: skip
        return True
