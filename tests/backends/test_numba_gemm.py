"""The Numba backend's own matrix product: every size and form against NumPy, nothing beside C written, equal bits however cut."""

import numpy as np
import pytest
from fresh_process import first_words
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from minimoe_numba import gemm
from minimoe_numba.native import PLAIN, TRANSPOSED, call_sgemm

SIZES = st.one_of(st.integers(0, 70), st.sampled_from([gemm.DEPTH, gemm.DEPTH + 1, gemm.TALL_BLOCK + 13, gemm.WIDE_BLOCK + 33]))


@njit
def multiply_at(address, trans_a, trans_b, m, n, k, a, lda, b, ldb, beta, c, ldc):
    call_sgemm(address, trans_a, trans_b, m, n, k, a, lda, b, ldb, beta, c, ldc)


def multiply(a, b, trans_a, trans_b, beta, c):
    """c = op(a) op(b) + beta c for views whose rows are contiguous."""
    (m, n), k = c.shape, a.shape[0 if trans_a else 1]
    ways = [TRANSPOSED if trans else PLAIN for trans in (trans_a, trans_b)]
    lda, ldb, ldc = (x.strides[0] // 4 for x in (a, b, c))
    address = gemm.machine_code().address
    multiply_at(address, *ways, m, n, k, a.ctypes.data, lda, b.ctypes.data, ldb, np.float32(beta), c.ctypes.data, ldc)


def within(rows, columns, draw):
    """A matrix inside a larger one, whose border shows what is written beside it. -> the whole, the matrix"""
    whole = draw.standard_normal((rows + 2, columns + 5)).astype(np.float32)
    return whole, whole[1 : rows + 1, 2 : columns + 2]


@settings(max_examples=150)
@given(m=SIZES, n=SIZES, k=SIZES, trans_a=st.booleans(), trans_b=st.booleans(), beta=st.sampled_from([0.0, 1.0, 0.5]))
def test_a_product_of_any_size_and_form_is_numpys(m, n, k, trans_a, trans_b, beta):
    draw = np.random.default_rng(m + 1000 * n + k)
    a, b = within(*((k, m) if trans_a else (m, k)), draw)[1], within(*((n, k) if trans_b else (k, n)), draw)[1]
    whole, c = within(m, n, draw)
    before = whole.copy()
    if beta == 0.0:
        c[:] = np.nan  # what was there must not count
    expected = (a.T if trans_a else a).astype(np.float64) @ (b.T if trans_b else b).astype(np.float64)
    expected += beta * before[1 : m + 1, 2 : n + 2] if beta else 0.0
    multiply(a, b, trans_a, trans_b, beta, c)
    assert np.allclose(c, expected, rtol=0, atol=1e-6 * (10 + k))
    c[:] = before[1 : m + 1, 2 : n + 2]
    assert np.array_equal(whole, before)


@pytest.mark.parametrize("trans_a", [False, True])
@pytest.mark.parametrize("trans_b", [False, True])
def test_equal_bits_however_rows_and_columns_are_cut(trans_a, trans_b):
    draw = np.random.default_rng(0)
    m, n, k = 101, 203, 300
    a, b = (draw.standard_normal(s).astype(np.float32) for s in ((k, m) if trans_a else (m, k), (n, k) if trans_b else (k, n)))
    whole, parts = np.empty((m, n), np.float32), np.empty((m, n), np.float32)
    multiply(a, b, trans_a, trans_b, 0.0, whole)
    for i in (slice(0, 1), slice(1, 39), slice(39, m)):
        for j in (slice(0, 50), slice(50, n)):
            multiply(a[:, i] if trans_a else a[i], b[j] if trans_b else b[:, j], trans_a, trans_b, 0.0, parts[i, j])
    assert np.array_equal(whole, parts)


def test_nan_and_infinity_go_through():
    a, b = np.ones((3, 4), np.float32), np.ones((4, 40), np.float32)
    a[0, 0], b[1, 5], b[2, 39] = np.nan, np.inf, -np.inf
    c = np.empty((3, 40), np.float32)
    multiply(a, b, False, False, 0.0, c)
    assert np.array_equal(c, a @ b, equal_nan=True)


PROCESSORS = {"avx2": "+sse3,+ssse3,+sse4.1,+sse4.2,+avx,+avx2,+fma", "plain": ""}


@pytest.mark.parametrize("features", PROCESSORS.values(), ids=PROCESSORS)
def test_narrower_vectors_give_the_same_product(features, tmp_path):
    code = (
        "import numpy as np; from backends import test_numba_gemm as t\n"
        "draw = np.random.default_rng(0)\n"
        "for trans_a, trans_b in ((0, 0), (0, 1), (1, 0), (1, 1)):\n"
        "    a, b = (draw.standard_normal((75, 75)).astype(np.float32) for _ in range(2))\n"
        "    c = np.empty((75, 75), np.float32)\n"
        "    t.multiply(a, b, trans_a, trans_b, 0.0, c)\n"
        "    assert np.allclose(c, (a.T if trans_a else a) @ (b.T if trans_b else b), atol=1e-4)\n"
        "print('WIDTH', t.gemm.WIDTH)\n"
    )
    words = first_words(code=code, NUMBA_CACHE_DIR=str(tmp_path), NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES=features)
    assert int(words.split("WIDTH")[1].split()[0]) == (8 if "avx2" in features else 4)
