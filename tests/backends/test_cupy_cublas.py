"""Checks the arguments passed to cuBLAS, with a stand-in that multiplies by columns as cuBLAS does, in the host's memory."""

import ctypes
import gc
import importlib
import sys
import threading
import weakref

import ml_dtypes
import numpy as np
import pytest
from two_devices import Cupy, Library

from minimoe_cupy import cublas
from minimoe_cupy.cublas import KEEP, TURN, WORKSPACE, Cublas, batch_of, computes, operand, product


def column_major(address, rows, columns, stride):
    """The matrix [rows,columns] of float32 that stands there by columns."""
    memory = (ctypes.c_float * (stride * columns)).from_address(address)
    return np.ctypeslib.as_array(memory).reshape(columns, stride)[:, :rows].T


def gemm(operation_a, operation_b, m, n, k, a, stride_a, b, stride_b, c, stride_c):
    """cublasGemmEx: c = op(a) op(b), by columns."""
    left = column_major(a, *((m, k) if operation_a == KEEP else (k, m)), stride_a)
    right = column_major(b, *((k, n) if operation_b == KEEP else (n, k)), stride_b)
    column_major(c, m, n, stride_c)[...] = (left if operation_a == KEEP else left.T) @ (right if operation_b == KEEP else right.T)


@pytest.mark.parametrize("turned", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (3, 5, 7), (8, 1, 4), (1, 6, 2), (4, 4, 1)])
def test_products_of_rows_become_products_of_columns(m, n, k, turned):
    draw = np.random.default_rng(m + n + k)
    a, b = (draw.standard_normal(shape[::-1] if t else shape).astype(np.float32) for shape, t in (((m, k), turned[0]), ((k, n), turned[1])))
    a, b = a.T if turned[0] else a, b.T if turned[1] else b
    out = np.full((m, n), np.nan, np.float32)
    gemm(*product(a, b, out))
    assert np.allclose(out, a @ b, atol=1e-5)


def test_layouts_are_named_and_others_left_alone():
    x = np.zeros((4, 6), np.float32)
    assert operand(x)[0] == KEEP and operand(x.T)[0] == TURN and operand(x[:, ::2]) is None
    assert product(x, x.T, np.zeros((4, 8), np.float32)[:, ::2]) is None


BATCHES = {
    "one batch of both": (lambda d: d(3, 4, 5), lambda d: d(3, 5, 6)),
    "several leading axes": (lambda d: d(2, 3, 4, 5), lambda d: d(2, 3, 5, 6)),
    "one matrix for all": (lambda d: d(4, 5), lambda d: d(3, 5, 6)),
    "one axis broadcast": (lambda d: d(2, 3, 4, 5), lambda d: d(2, 1, 5, 6)),
    "fewer axes": (lambda d: d(2, 3, 4, 5), lambda d: d(3, 5, 6)),
    "turned": (lambda d: d(3, 5, 4).swapaxes(1, 2), lambda d: d(3, 6, 5).swapaxes(1, 2)),
    "heads in the middle": (lambda d: d(2, 4, 3, 5).transpose(0, 2, 1, 3), lambda d: d(2, 6, 3, 5).transpose(0, 2, 3, 1)),
    "one matrix, turned": (lambda d: d(5, 4).T, lambda d: d(3, 5, 6)),
    "rows apart": (lambda d: d(3, 4, 10)[:, :, ::2], lambda d: d(3, 10, 6)[:, ::2, :]),
    "a column": (lambda d: d(3, 4, 1), lambda d: d(3, 1, 6)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_products_are_walked_in_steps(name):
    """cublasGemmStridedBatchedEx by the stand-in, a product after another."""
    draw = np.random.default_rng(0)
    a, b = (make(lambda *shape: draw.standard_normal(shape).astype(np.float32)) for make in BATCHES[name])
    wanted = a @ b
    out = np.full(wanted.shape, np.nan, np.float32)
    (m, k), n, leading = a.shape[-2:], b.shape[-1], wanted.shape[:-2]
    left, right = (batch_of(x, leading, np.ascontiguousarray) for x in (a, b))
    for i in range(int(np.prod(leading))):
        sides = [(side.operand.address + 4 * i * side.step, side.operand.stride) for side in (right, left)]
        at = out.ctypes.data + 4 * i * m * n
        gemm(right.operand.operation, left.operand.operation, n, m, k, *sides[0], *sides[1], at, n)
    assert np.allclose(out, wanted, atol=1e-5)


# ---- handles, workspaces and dtypes, with a stand-in for CuPy with two devices -----------------------------------------------------------


@pytest.fixture
def cupy(monkeypatch):
    fake = Cupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(cublas, "load_library", lambda: fake.library)
    monkeypatch.setattr(cublas, "WORKSPACE", 1024)
    fake.library = Library(fake)
    return fake


def multiply(library, a=(3, 5), b=(5, 4), dtype=np.float32, to=None, accumulate=False):
    """A product; -> the arguments of cublasGemmEx"""
    a, b = np.zeros(a, dtype), np.zeros(b, dtype)
    assert library.matmul(a, b, np.zeros((a.shape[0], b.shape[1]), to or dtype), accumulate)


def test_each_device_and_each_thread_has_a_handle_and_a_workspace(cupy):
    library = Cublas()
    assert library.workspace() is None
    for device in (0, 1, 0, 1):
        with cupy.cuda.Device(device):
            multiply(library)
    thread = threading.Thread(target=multiply, args=[library])
    thread.start()
    thread.join()
    assert cupy.library.created == [0, 1, 0] and [device for device, _ in cupy.allocated] == [0, 1, 0]
    used = [(handle, args[0]) for name, handle, args in cupy.library.calls if name == "cublasSetWorkspace_v2"]
    first, second, third = (array.data.ptr for _, array in cupy.allocated)
    assert used == [(1, first), (2, second), (1, first), (2, second), (3, third)]
    assert [handle for name, handle, _ in cupy.library.calls if name == "cublasGemmEx"] == [1, 2, 1, 2, 3]


BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    "dtype, to, accumulate, kinds, compute",
    [
        (np.float32, np.float32, False, (0, 0, 0), 68),
        (np.float32, np.float32, True, (0, 0, 0), 68),
        (BF16, BF16, False, (14, 14, 14), 68),
        (BF16, np.float32, False, (14, 14, 0), 68),
        (BF16, np.float32, True, (14, 14, 0), 68),
        (np.float64, np.float64, True, (1, 1, 1), 70),
    ],
)
def test_sums_of_bfloat16_go_to_float32_as_they_are_and_are_added_there(cupy, dtype, to, accumulate, kinds, compute):
    library = Cublas()
    multiply(library, dtype=dtype, to=to, accumulate=accumulate)
    name, _, args = cupy.library.calls[-1]
    alpha, _, kind_b, _, _, kind_a, _, beta, _, kind_out, _, *rest = args[5:]
    assert name == "cublasGemmEx" and (kind_b, kind_a, kind_out) == kinds and rest[0] == compute
    assert (alpha, beta) == (1.0, 1.0 if accumulate else 0.0)


def test_a_product_over_nothing_is_zero_and_adds_nothing(cupy):
    out = np.full((3, 4), 2.0, np.float32)
    library, a, b = Cublas(), np.zeros((3, 0), BF16), np.zeros((0, 4), BF16)
    assert library.matmul(a, b, out, True) and (out == 2).all()
    assert library.matmul(a, b, out) and not out.any()


def test_other_pairs_of_dtypes_are_left_alone():
    a, b = np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float64)
    half = a.astype(BF16)
    assert computes(half, half, a) and not computes(a, a, half) and not computes(half, half, b) and not computes(a, half, a)


def test_a_recorded_graph_keeps_the_workspace_of_a_thread_that_has_ended(cupy, monkeypatch):
    monkeypatch.delitem(sys.modules, "minimoe_cupy.graph", raising=False)
    graph = importlib.import_module("minimoe_cupy.graph")
    monkeypatch.delitem(sys.modules, "minimoe_cupy.graph")
    library, recorded = Cublas(), []

    def record():
        with cupy.cuda.Device(1):
            recorded.append(graph.record(lambda: multiply(library), lambda why: None, library.workspace))

    thread = threading.Thread(target=record)
    thread.start()
    thread.join()
    workspace = weakref.ref(cupy.allocated.pop()[1])
    del thread
    gc.collect()
    assert workspace() is not None and workspace().data.ptr == next(
        args[0] for name, _, args in cupy.library.calls if name == "cublasSetWorkspace_v2"
    )
    recorded[0]()
    assert cupy.launched == [1, 1] and cupy.current == 0  # on its device: once when it was recorded, and again
    recorded.clear()
    gc.collect()
    assert workspace() is None


def test_the_workspace_is_as_large_as_cublas_recommends_for_hopper():
    assert WORKSPACE == 32 * 2**20
