"""Checks the arguments passed to cuBLAS, with a stand-in that multiplies by columns as cuBLAS does, in the host's memory."""

import ctypes

import numpy as np
import pytest

from minimoe_cupy.cublas import KEEP, TURN, batch_of, operand, product


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
