"""The ladder in CUDA C: every rung agrees with NumPy at odd sizes, in every schedule."""

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from ptx_machine.assembled import compile_for
from ptx_machine.cupy_on_ptx import CupyOnPtx
from ptx_machine.schedules import EVERY_SCHEDULE

from benchmarks.cuda_ladder import ATTENTIONS, PRODUCTS
from minimoe_cupy import sources
from minimoe_cupy.ladder import LADDER, PRODUCT

LADDER_OF_PRODUCTS = [name for name in PRODUCTS if name in PRODUCT.names]
LADDER_OF_ATTENTION = [name for name in ATTENTIONS if name != "attention_bf16"]
UNTOUCHED = 7.0
ROUNDING = 2.0**-8  # of bfloat16


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("seed", EVERY_SCHEDULE)
@pytest.mark.parametrize("rung", LADDER_OF_PRODUCTS)
@pytest.mark.parametrize(
    "counts, depth, width",
    [((1,), 1, 1), ((0, 5, 33), 7, 35), ((64, 0, 70, 3), 64, 64), ((0, 0), 8, 8), ((31, 65), 72, 100), ((3, 130), 200, 66), ((5,), 0, 9)],
    ids=str,
)  # fmt: skip
def test_a_product_agrees_with_numpy_and_leaves_unused_rows_alone(rung, seed, counts, depth, width):
    offsets = np.cumsum([0, *counts]).astype(np.int32)
    used = offsets[-1]
    x, weight = numbers(0, used + 3, depth), numbers(1, len(counts), width, depth)
    expected = np.full((used + 3, width), UNTOUCHED)
    for e, (first, last) in enumerate(pairwise(offsets)):
        expected[first:last] = x[first:last].astype(float) @ weight[e].astype(float).T
    y = np.full(expected.shape, UNTOUCHED, ml_dtypes.bfloat16)
    PRODUCTS[rung].run(CupyOnPtx(seed), x, weight, offsets, y)
    np.testing.assert_allclose(y.astype(float), expected, rtol=ROUNDING, atol=1e-4)


@pytest.mark.parametrize("seed", EVERY_SCHEDULE)
@pytest.mark.parametrize("rung", LADDER_OF_ATTENTION)
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(
    "sequences, tokens, heads, groups, width, scale",  # scores of hundreds: their exponentials overflow
    [(1, 1, 1, 1, 1, 0.3), (2, 33, 4, 2, 24, 0.3), (1, 64, 2, 2, 128, 0.1), (2, 7, 6, 1, 33, -0.2), (1, 70, 3, 3, 65, 30.0)],
)
def test_attention_agrees_with_numpy(rung, seed, causal, sequences, tokens, heads, groups, width, scale):
    q = numbers(0, sequences, tokens, heads, width)
    k, v = numbers(1, sequences, tokens, groups, width), numbers(2, sequences, tokens, groups, width)
    keys, values = (np.repeat(a.astype(float), heads // groups, axis=2) for a in (k, v))
    scores = scale * np.einsum("bihc,bjhc->bhij", q.astype(float), keys)
    if causal:
        scores[:, :, np.triu(np.ones((tokens, tokens), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhij,bjhc->bihc", weights / weights.sum(-1, keepdims=True), values)
    y = np.zeros_like(q)
    ATTENTIONS[rung].run(CupyOnPtx(seed), q, k, v, y, scale, causal)
    np.testing.assert_allclose(y.astype(float), expected, rtol=ROUNDING, atol=1e-4)


def test_the_third_rung_alone_multiplies_on_the_tensor_cores():
    made = compile_for(PRODUCT.path, PRODUCT.names, "sm_90a")
    assert [name for name in PRODUCT.names if "mma.sync" in made[name].ptx] == ["product_mma"]


def test_no_user_compiles_the_ladder():
    assert not {source.file for source in LADDER} & {source.file for source in sources()}
