"""Dense products: each thread computes a piece of the result's rows, or of its columns if it has more columns than rows."""

import math

import numpy as np
from numba import carray

from minimoe.backend import Array
from minimoe_numba.arrays import optional, result, singles
from minimoe_numba.gemm import FEW
from minimoe_numba.kernel import F1, address, kernel
from minimoe_numba.machine import machine
from minimoe_numba.native import PLAIN, call_sgemm, pointer
from minimoe_numpy import NumpyBackend

WORD = 4  # bytes of a float32
SMALL = 2**18  # multiply-adds per piece, at least: a few microseconds
PIECES = 1  # per thread: more would balance better, but each piece packs the other side again
FEW_ROWS_SMALL, FEW_ROWS_PIECES = 2**15, 4  # the same for few rows: weights per piece, since reading them takes the time
ROUND = 32  # pieces end at multiples of this, as tiles do


@kernel
def product(
    start: int, stop: int, sgemm: int, trans_a: int, trans_b: int, m: int, n: int, k: int, a: int, lda: int, b: int, ldb: int, beta: float,
    c: int, ldc: int, bias: F1, by_columns: int,
) -> None:  # fmt: skip
    """C = op(A) op(B) + beta C + bias for rows (or columns) start .. stop of C [m,n]. Matrices are addresses with row strides."""
    row, column, rows, columns = start, 0, stop - start, n
    if by_columns:
        row, column, rows, columns = 0, start, m, stop - start
    a_piece = a + 4 * (row if trans_a else row * lda)
    b_piece = b + 4 * (column * ldb if trans_b else column)
    c_piece = c + 4 * (row * ldc + column)
    call_sgemm(sgemm, PLAIN + trans_a, PLAIN + trans_b, rows, columns, k, a_piece, lda, b_piece, ldb, beta, c_piece, ldc)
    if bias.size:
        for r in range(rows):
            y = carray(pointer(c_piece + 4 * r * ldc, np.float32), (columns,))
            for d in range(columns):
                y[d] += bias[column + d]


def multiply(a: Array, b: Array, c: Array, trans_a: int = 0, trans_b: int = 0, beta: float = 0.0, bias: Array | None = None) -> None:
    """c = op(a) op(b) + beta c + bias. All are float32 [rows, columns] with contiguous rows (`fit` makes them so)."""
    m, n = c.shape
    k = a.shape[0] if trans_a else a.shape[1]
    blas = machine().blas
    assert blas is not None
    by_columns = n > m
    whole = n if by_columns else m
    if by_columns and m <= FEW:
        grain = shared_out(whole, n * k // FEW_ROWS_SMALL, FEW_ROWS_PIECES)
    else:
        grain = shared_out(whole, m * n * k // SMALL)
    lda, ldb, ldc = (x.strides[0] // WORD for x in (a, b, c))
    product(
        whole, grain, blas.sgemm, trans_a, trans_b, m, n, k, address(a), lda, address(b), ldb, beta, address(c), ldc, optional(bias),
        by_columns,
    )  # fmt: skip


def shared_out(rows: int, most: int = 2**30, each: int = PIECES) -> int:
    """Return the rows per piece for a product of `rows` rows: `each` pieces per thread, at most `most` in all."""
    threads = machine().pool.threads
    pieces = max(1, min(each * threads, most)) if threads > 1 else 1
    return -(-rows // (pieces * ROUND)) * ROUND


def fit(x: Array) -> Array:
    """Return x as a matrix with contiguous rows, copied only if necessary.   [...,D] -> [N,D]"""
    if x.ndim != 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    good = x.strides[1] == WORD and x.strides[0] % WORD == 0 and x.strides[0] >= x.shape[1] * WORD
    return x if good else x.copy()


class FastLinear(NumpyBackend):
    def linear(self, x: Array, weight: Array, bias: Array | None = None, out: Array | None = None) -> Array:
        if not self._multiplies(x, weight, bias):
            return super().linear(x, weight, bias, out)
        shape = (*x.shape[:-1], weight.shape[0])
        y = result(out, shape)
        multiply(fit(x), fit(weight), y.reshape(-1, shape[-1]), trans_b=1, bias=bias)
        return y if y is out else self.store(y, out)

    def linear_dx(self, dy: Array, weight: Array, out: Array | None = None, accumulate: bool = False) -> Array:
        if not self._multiplies(dy, weight):
            return super().linear_dx(dy, weight, out, accumulate)
        shape = (*dy.shape[:-1], weight.shape[1])
        dx = result(out, shape)
        multiply(fit(dy), fit(weight), dx.reshape(-1, shape[-1]), beta=float(accumulate and dx is out))
        return dx if dx is out else self.store(dx, out, accumulate)

    def linear_dw(self, dy: Array, x: Array, out: Array | None = None, accumulate: bool = False) -> Array:
        if not self._multiplies(dy, x):
            return super().linear_dw(dy, x, out, accumulate)
        dw = result(out, (dy.shape[-1], x.shape[-1]))
        multiply(fit(dy), fit(x), dw, trans_a=1, beta=float(accumulate and dw is out))
        return dw if dw is out else self.store(dw, out, accumulate)

    def _multiplies(self, *arrays: Array | None) -> bool:
        """True if all are float32 and not empty, and there is a product to call."""
        for array in arrays:
            if array is not None and not array.size:
                return False
        return singles(*arrays) and machine().blas is not None
