"""The moves of rows back from their experts, on the processor: every number of choices, in the order of the slots, to the bit."""

import re

import ml_dtypes
import numpy as np
import pytest
from ptx_machine.assembled import compile_for
from ptx_machine.cupy_on_ptx import CupyOnPtx

from minimoe.reference.routing import Plan
from minimoe_cupy.dispatch import AT_ONCE, COMBINE, at_once

BACKEND = CupyOnPtx()
DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)]


def drawn(n, width, d, dtype):
    """A plan of n tokens in which a quarter of the slots has no row, rows, weights and dy; what must not be read is NaN.

    Weights are powers of two: their products are exact, so a sum has the same bits with and without fused additions.
    """
    draw = np.random.default_rng([n, width, d])
    inverse = draw.permutation(n * width).astype(np.int32).reshape(n, width)
    inverse[draw.random((n, width)) < 0.25] = -1
    rows, dy = (draw.standard_normal((count, d)).astype(dtype) for count in (n * width, n))
    rows[np.setdiff1d(np.arange(n * width), inverse)] = np.nan
    weights = (2.0 ** draw.integers(-3, 3, (n, width))).astype(np.float32)
    weights[inverse < 0] = np.nan
    return Plan(np.zeros(n * width, np.int32), inverse, np.zeros(2, np.int32)), rows, weights, dy


def summed(rows, weights, inverse):
    """The sum over a token's slots in float32, one after the other."""
    y = np.zeros((inverse.shape[0], rows.shape[1]), np.float32)
    for slot in range(inverse.shape[1]):
        for token in np.flatnonzero(inverse[:, slot] >= 0):
            y[token] += rows[inverse[token, slot]].astype(np.float32) * weights[token, slot]
    return y.astype(rows.dtype)


def check_moves(backend, width, n, d, dtype):
    """A token's rows are added in the order of its slots, to the bit, and what goes back to each is right."""
    plan, rows, weights, dy = drawn(n, width, d, dtype)
    assert np.array_equal(backend.combine(rows, weights, plan), summed(rows, weights, plan.inverse))
    assert np.array_equal(backend.dispatch_backward(rows, plan), summed(rows, np.ones_like(weights), plan.inverse))
    drows, dweights = backend.combine_backward(dy, rows, weights, plan)
    for token, slot in np.argwhere(plan.inverse >= 0):
        row = plan.inverse[token, slot]
        assert np.array_equal(drows[row], (dy[token].astype(np.float32) * weights[token, slot]).astype(dtype))
        assert np.isclose(dweights[token, slot], rows[row].astype(np.float64) @ dy[token].astype(np.float64), rtol=1e-5, atol=1e-4)
    assert not dweights[plan.inverse < 0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, d", [(1, 1), (9, 7), (5, 264)])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8, 9, 17])
def test_choices_are_added_in_the_order_of_the_slots(width, n, d, dtype):
    check_moves(BACKEND, width, n, d, dtype)


@pytest.mark.parametrize("kernel", ["combine", "combine_backward"])
@pytest.mark.parametrize("width", AT_ONCE)
def test_all_rows_of_a_token_are_asked_for_before_the_first_is_added(kernel, width):
    """In the PTX, `width` loads of 16 bytes of gathered rows follow one another without arithmetic on floats between them."""
    for name in (f"{kernel}<float, {at_once(width)}, 4>", f"{kernel}<bf16, {at_once(width)}, 8>"):
        ptx = compile_for(COMBINE.path, [name], "sm_90a")[name].ptx
        runs = [len(re.findall(r"ld\.global(?:\.nc)?\.v4", part)) for part in re.split(r"\b(?:fma|mul|add)(?:\.rn)?\.f32", ptx)]
        assert max(runs) >= width, f"{name}: {max(runs)} loads in flight"
