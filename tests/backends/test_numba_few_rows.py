"""Few rows on the backend `numba`, as in decoding: the bits that they have among many, whichever thread reads which of the weights."""

import numpy as np
import pytest

from minimoe.reference.attention import AttentionKernels
from minimoe.reference.expert import ExpertWeights
from minimoe_numba import NumbaBackend, expert
from minimoe_numba import blas as blas_module
from minimoe_numba.gemm import FEW
from minimoe_numba.machine import machine
from minimoe_numpy import NumpyBackend

NUMBA = NumbaBackend()


@pytest.fixture(autouse=True)
def our_product(monkeypatch):
    """A library's product may sum in another order where rows are few."""
    monkeypatch.setattr(machine(), "blas", blas_module.own_product())


def floats(draw, *shape):
    return draw.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("m", [1, 2, 3, 5, FEW, FEW + 1])
@pytest.mark.parametrize("n, k", [(1, 1), (7, 8), (16, 300), (203, 257), (1000, 64)])
def test_a_row_of_a_product_has_the_same_bits_however_many_stand_beside_it(m, n, k):
    draw = np.random.default_rng(m * n * k)
    x, weight, bias = floats(draw, 40, k), floats(draw, n, k), floats(draw, n)
    assert np.array_equal(NUMBA.linear(x[:m], weight, bias), NUMBA.linear(x, weight, bias)[:m])


@pytest.mark.parametrize("activation, limit", [("swiglu", 0.0), ("swiglu", 1.5), ("gelu", 0.0), ("relu", 0.0)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("n, e, k, width, hidden", [(1, 8, 2, 32, 130), (8, 3, 2, 20, 24), (31, 5, 2, 150, 300), (3, 1, 1, 17, 9)])
def test_experts_have_the_same_bits_by_slices_of_weights_and_by_blocks_of_rows(
    n, e, k, width, hidden, biased, activation, limit, monkeypatch
):
    draw = np.random.default_rng(n + hidden)
    both = hidden * (2 if activation == "swiglu" else 1)
    biases = (floats(draw, e, both), floats(draw, e, width)) if biased else (None, None)
    weights = ExpertWeights(floats(draw, e, both, width), floats(draw, e, width, hidden), *biases)
    ids = np.argsort(draw.random((n, e)), axis=1)[:, :k].astype(np.int32)
    valid = np.arange(n) != 1  # padding: rows that no expert has
    x, gate_weights = floats(draw, n, width), np.abs(floats(draw, n, k))
    plan = NUMBA.route(ids, gate_weights, valid, n_experts=e, rows=n * k)
    found = []
    for few, threads in ((64, 1), (64, 3), (0, 2)):
        monkeypatch.setattr(expert, "FEW", few)
        NUMBA.use_threads(threads)
        y, saved = NUMBA.moe_ffn(x, gate_weights, plan, weights, activation, limit)
        dx, dgate, dweights = NUMBA.moe_ffn_backward(y, saved, activation, limit)
        found.append([y, dx, dgate, *(d for d in dweights if d is not None)])
    NUMBA.use_threads(0)
    for others in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], others, strict=True))
    expected, _ = NumpyBackend().moe_ffn(x, gate_weights, plan, weights, activation, limit)
    np.testing.assert_allclose(found[0][0], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("slots, width", [(1, 8), (37, 16), (300, 24)])
def test_one_query_over_a_ring_sees_what_stands_there_whatever_the_order(slots, width, window):
    """The newest position may lie anywhere."""
    draw = np.random.default_rng(slots)
    b, queries, groups = 3, 4, 2
    q, k, v = floats(draw, b, 1, queries, width), floats(draw, b, slots, groups, width), floats(draw, b, slots, groups, width + 8)
    positions = np.stack([np.roll(np.arange(slots, dtype=np.int32), shift) for shift in (0, 5, 11)])
    valid = draw.random((b, slots)) < 0.7
    valid[positions == slots - 1] = True
    options = {"scale": 0.3, "causal": True, "window": window, "q_pos": np.full((b, 1), slots - 1, np.int32), "k_pos": positions}
    expected, lse = AttentionKernels.attention(NUMBA, q, k, v, k_valid=valid, **options)
    found, found_lse = NUMBA.attention(q, k, v, k_valid=valid, **options)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found_lse, lse, rtol=0, atol=1e-5)
