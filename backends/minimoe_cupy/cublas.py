"""Dense products by cuBLAS, single or in a batch, called directly: CuPy's own calls cannot be recorded in a CUDA graph.

Sums are float32 (float64 for float64), never TF32; those of bfloat16 can be stored as they are. Each thread has a handle for each device,
and a workspace with a fixed address, which a recorded graph holds.
"""

import ctypes
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from minimoe.backend import Array
from minimoe_cupy.device import current_device
from minimoe_cupy.launch import BFLOAT16, FLOAT32, address

NAMES = ("libcublas.so.13", "libcublas.so.12", "cublas64_13.dll", "cublas64_12.dll")  # CuPy has loaded one of these
DATA = {FLOAT32: 0, np.dtype(np.float64): 1, BFLOAT16: 14}  # cudaDataType_t
COMPUTE_32F, COMPUTE_64F = 68, 70  # cublasComputeType_t
NO_NARROW_SUMS = 16  # cublasMath_t: partial sums, too, are added in float32
DEFAULT_ALGORITHM = -1
WORKSPACE = 32 * 2**20  # bytes: what cuBLAS recommends for Hopper
KEEP, TURN = 0, 1  # cublasOperation_t: as it is, transposed


class Operand(NamedTuple):
    """A row-major matrix as cuBLAS, which is column-major, sees it."""

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
    """Returns the arguments of cublasGemmEx for a row-major out = a b: column-major out^T = b^T a^T.   a [M,K], b [K,N], out [M,N]

    -> operations of b and a, N, M, K, addresses and strides of b, a and out; None for a layout that cuBLAS does not take.
    """
    left, right = operand(a), operand(b)
    if left is None or right is None or not out.flags.c_contiguous:
        return None
    (m, k), n = a.shape, b.shape[1]
    return (right.operation, left.operation, n, m, k, right.address, right.stride, left.address, left.stride, address(out), max(n, 1))


class Batch(NamedTuple):
    """An operand of many products of one shape: each matrix is `step` elements after the last."""

    matrix: Array  # the first of them, or the array that holds all
    operand: Operand
    step: int


def batch_of(x: Array, leading: tuple[int, ...], contiguous: Callable[[Array], Array]) -> Batch:
    """Returns x [...,rows,columns] with its leading axes broadcast to `leading`; copied if one step cannot reach all matrices."""
    rows, columns = x.shape[-2:]
    if x.ndim == 2 or all(size == 1 for size in x.shape[:-2]):
        x = x.reshape(rows, columns)
        found = operand(x)
        if found is None:
            x = contiguous(x)
            found = operand(x)
        assert found is not None
        return Batch(x, found, 0)
    turned = x.swapaxes(-1, -2)
    if tuple(x.shape[:-2]) == leading and turned.flags.c_contiguous and not x.flags.c_contiguous:
        return Batch(x, Operand(TURN, address(x), max(rows, 1)), rows * columns)
    if tuple(x.shape[:-2]) != leading:
        full = contiguous(x[(None,) * (len(leading) + 2 - x.ndim)])
        for axis, size in enumerate(leading):
            if full.shape[axis] != size:
                full = full.repeat(size, axis=axis)
        x = full
    x = contiguous(x)
    return Batch(x, Operand(KEEP, address(x), max(columns, 1)), rows * columns)


def load_library() -> Any:
    """Returns the library that CuPy has loaded. Raises RuntimeError if it is not found."""
    from cupy_backends.cuda.libs import cublas as loaded  # noqa: F401  importing it loads the library

    for name in NAMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeError(f"cuBLAS was not found under any of {', '.join(NAMES)}")


class Handle(NamedTuple):
    """A thread's handle for one device, and the memory on that device that its products may use."""

    handle: ctypes.c_void_p
    workspace: Array


class Cublas(threading.local):
    """The library, with a handle for each thread and device."""

    def __init__(self) -> None:
        self.handles: dict[int, Handle] = {}
        self.library: Any = None

    def workspace(self) -> Array | None:
        """Returns this thread's workspace on the current device, if there is one: a graph that was recorded here has its address."""
        made = self.handles.get(current_device())
        return None if made is None else made.workspace

    def _handle(self) -> Handle:
        """Returns this thread's handle for the current device."""
        import cupy

        device = current_device()
        if device not in self.handles:
            self.library = self.library or load_library()
            handle = ctypes.c_void_p()
            self._call("cublasCreate_v2", ctypes.byref(handle))
            self._call("cublasSetMathMode", handle, NO_NARROW_SUMS)
            self.handles[device] = Handle(handle, cupy.empty(WORKSPACE, dtype=cupy.uint8))
        return self.handles[device]

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self.library, name)(*args)
        if status:
            raise RuntimeError(f"{name}: cuBLAS gave status {status}")

    def matmul(self, a: Array, b: Array, out: Array, accumulate: bool = False) -> bool:
        """Computes out = a b, or adds a b to it, on the current stream.

        Returns False, and does nothing, for a dtype or layout that cuBLAS lacks.
        """
        arguments = product(a, b, out) if computes(a, b, out) else None
        if arguments is None:
            return False
        if not out.size:
            return True
        if not a.size:
            if not accumulate:
                out[...] = 0
            return True
        operation_b, operation_a, n, m, k, at_b, stride_b, at_a, stride_a, at_out, stride = arguments
        shape, sides = (operation_b, operation_a, n, m, k), ((at_b, stride_b), (at_a, stride_a), (at_out, stride))
        self._multiply("cublasGemmEx", (a.dtype, out.dtype), shape, *sides, (), accumulate)
        return True

    def matmul_batch(self, a: Array, b: Array, out: Array, contiguous: Callable[[Array], Array]) -> bool:
        """Does the same for every index of the leading axes, broadcast for a and b.   a [...,M,K], b [...,K,N], out [...,M,N]"""
        if not computes(a, b, out) or not out.flags.c_contiguous:
            return False
        if not out.size:
            return True
        if not a.size:
            out[...] = 0
            return True
        (m, k), n, leading = a.shape[-2:], b.shape[-1], tuple(out.shape[:-2])
        left, right = (batch_of(x, leading, contiguous) for x in (a, b))
        shape = right.operand.operation, left.operand.operation, n, m, k
        second, first = ((side.operand.address, side.operand.stride, side.step) for side in (right, left))
        third, count = (address(out), max(n, 1), m * n), (math.prod(leading),)
        self._multiply("cublasGemmStridedBatchedEx", (a.dtype, out.dtype), shape, second, first, third, count, False)
        return True

    def _multiply(
        self, name: str, dtypes: tuple[Any, Any], shape: tuple[int, ...], right: tuple[int, ...], left: tuple[int, ...],
        out: tuple[int, ...], count: tuple[int, ...], accumulate: bool,
    ) -> None:  # fmt: skip
        """Calls cuBLAS with the dtypes of operands and result, operations and sizes, and each matrix's address, stride and step."""
        import cupy

        handle, workspace = self._handle()
        double = dtypes[0] == np.float64
        number = ctypes.c_double if double else ctypes.c_float
        one, old = number(1.0), number(1.0 if accumulate else 0.0)
        pointer = ctypes.c_void_p
        self._call("cublasSetStream_v2", handle, pointer(cupy.cuda.get_current_stream().ptr))
        self._call("cublasSetWorkspace_v2", handle, pointer(workspace.data.ptr), ctypes.c_size_t(WORKSPACE))
        kinds = DATA[dtypes[0]], DATA[dtypes[0]], DATA[dtypes[1]]
        sides = [
            (pointer(at), kind, stride, *map(ctypes.c_longlong, step))
            for (at, stride, *step), kind in zip((right, left, out), kinds, strict=True)
        ]
        self._call(
            name, handle, *shape, ctypes.byref(one), *sides[0], *sides[1], ctypes.byref(old), *sides[2], *count,
            COMPUTE_64F if double else COMPUTE_32F, DEFAULT_ALGORITHM,
        )  # fmt: skip


def computes(a: Array, b: Array, out: Array) -> bool:
    """Returns True for dtypes that cuBLAS multiplies: one for all, or float32 for the product of bfloat16."""
    return bool(a.dtype == b.dtype and a.dtype in DATA and (out.dtype == a.dtype or (a.dtype, out.dtype) == (BFLOAT16, FLOAT32)))
