"""The plan that sorts rows by expert, for whatever a router may choose: consistent, stable, within capacity, and fair to earlier tokens."""

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routed_layers import BACKENDS

NUMPY = BACKENDS["numpy"]
quick = settings(deadline=None, max_examples=120, derandomize=True)


@st.composite
def choices(draw):
    """ids [N,W] with each token's experts distinct (or -1), weights [N,W] with ties, valid [N] or None, E."""
    n, e = draw(st.integers(0, 24)), draw(st.integers(1, 6))
    width = draw(st.integers(1, e))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = np.argsort(rng.random((n, e)) * rng.choice([0.2, 1.0, 3.0], e), axis=1)[:, :width].astype(np.int32)
    if draw(st.booleans()):
        ids[rng.random(ids.shape) < 0.3] = -1
    weights = rng.integers(1, 6, ids.shape) / 5.0
    valid = rng.random(n) < 0.7 if draw(st.booleans()) else None
    return ids, weights, valid, e


capacities = st.one_of(st.none(), st.integers(0, 9))
priorities = st.sampled_from(["position", "probability"])


def plan_of(backend, ids, weights, valid, e, capacity, priority, rows=None):
    b = BACKENDS[backend]
    arrays = [None if a is None else b.from_host(a) for a in (ids, weights, valid)]
    plan = b.route(*arrays, n_experts=e, rows=ids.size if rows is None else rows, capacity=capacity, priority=priority)
    return tuple(np.array(b.to_host(a)) for a in plan)


def wanted(ids, valid):
    """Return which slots ask for a row.   -> bool [N,W]"""
    return (ids >= 0) if valid is None else (ids >= 0) & valid[:, None]


@quick
@given(choices(), capacities, priorities)
def test_order_inverse_and_offsets_agree(choice, capacity, priority):
    ids, _, valid, e = choice
    order, inverse, offsets = plan_of("numpy", *choice, capacity, priority)
    assert order.dtype == inverse.dtype == offsets.dtype == np.int32 and offsets[0] == 0 and len(offsets) == e + 1
    used = order[: offsets[-1]]
    for expert in range(e):
        for row in range(offsets[expert], offsets[expert + 1]):
            n, slot = divmod(int(order[row]), ids.shape[1])
            assert ids[n, slot] == expert and inverse[n, slot] == row
            assert valid is None or valid[n]
    assert (inverse >= 0).sum() == offsets[-1] == len(set(used.tolist()))
    assert inverse.min(initial=-1) == -1 or wanted(ids, valid).all()
    assert not (inverse >= 0)[~wanted(ids, valid)].any()


@quick
@given(choices(), capacities, priorities)
def test_rows_of_an_expert_stand_in_the_order_of_tokens_and_slots(choice, capacity, priority):
    order, _, offsets = plan_of("numpy", *choice, capacity, priority)
    for start, stop in zip(offsets, offsets[1:], strict=False):
        assert (np.diff(order[start:stop]) > 0).all()


@quick
@given(choices(), capacities, priorities)
def test_an_expert_gets_what_it_was_asked_for_up_to_its_capacity(choice, capacity, priority):
    ids, _, valid, e = choice
    _, _, offsets = plan_of("numpy", *choice, capacity, priority)
    counts = np.bincount(ids[wanted(ids, valid)], minlength=e)
    limit = counts if capacity is None else np.minimum(counts, capacity)
    assert np.diff(offsets).tolist() == limit.tolist()


@quick
@given(choices(), st.integers(0, 9))
def test_position_never_drops_an_earlier_token_for_a_later_one(choice, capacity):
    ids, weights, valid, e = choice
    _, inverse, _ = plan_of("numpy", *choice, capacity, "position")
    kept, asked = inverse >= 0, wanted(ids, valid)
    for expert in range(e):
        here = kept[asked & (ids == expert)]  # in the order of n, then slot
        assert (np.diff(here.astype(int)) <= 0).all()
    for n in range(0, len(ids), 5):  # a prefix of the tokens is treated as if the rest were not there
        _, prefix, _ = plan_of("numpy", ids[:n], weights[:n], None if valid is None else valid[:n], e, capacity, "position")
        assert ((prefix >= 0) == kept[:n]).all()


@quick
@given(choices(), st.integers(0, 9))
def test_probability_keeps_the_larger_weights_and_of_equals_the_earlier(choice, capacity):
    ids, weights, valid, e = choice
    _, inverse, _ = plan_of("numpy", *choice, capacity, "probability")
    kept, asked = inverse >= 0, wanted(ids, valid)
    for expert in range(e):
        here = asked & (ids == expert)
        ranked = kept[here][np.argsort(-weights[here], kind="stable")]
        assert (np.diff(ranked.astype(int)) <= 0).all()


@quick
@given(choices(), st.integers(0, 9), priorities)
def test_the_oracle_drops_the_same_slots(choice, capacity, priority):
    ids, weights, _, e = choice
    rows = [[int(i) for i in row if i >= 0] for row in ids]
    dense = np.zeros((len(ids), e))
    for n, slot in zip(*np.nonzero(ids >= 0), strict=True):
        dense[n, ids[n, slot]] = weights[n, slot]
    routing = oracles.Routing(dense, rows, np.zeros(e), dense)
    expected, _ = oracles.drop(routing, capacity, priority)
    _, inverse, _ = plan_of("numpy", ids, weights, None, e, capacity, priority)
    got = np.zeros_like(dense)
    for n, slot in zip(*np.nonzero(inverse >= 0), strict=True):
        got[n, ids[n, slot]] = weights[n, slot]
    assert np.array_equal(got, expected)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(choices(), capacities, priorities)
def test_another_array_library_makes_the_same_plan(choice, capacity, priority):
    for ours, theirs in zip(plan_of("numpy", *choice, capacity, priority), plan_of("strict", *choice, capacity, priority), strict=True):
        assert np.array_equal(ours, theirs)


@quick
@given(choices(), capacities, priorities, st.integers(0, 2**32 - 1))
def test_dispatch_and_combine_are_each_others_transpose(choice, capacity, priority, seed):
    ids, weights, valid, e = choice
    plan = NUMPY.route(ids, weights, valid, n_experts=e, rows=ids.size, capacity=capacity, priority=priority)
    rng = np.random.default_rng(seed)
    x, rows = rng.standard_normal((len(ids), 3)), rng.standard_normal((ids.size, 3))
    used = int(plan.offsets[-1])
    gathered = NUMPY.dispatch(x, plan)
    back = NUMPY.dispatch_backward(rows, plan)
    assert np.isclose((gathered[:used] * rows[:used]).sum(), (x * back).sum(), rtol=1e-10, atol=1e-12)
    rows[used:] = np.nan  # never read
    y = NUMPY.combine(rows, weights, plan)
    expected = np.zeros_like(x)
    for n, slot in zip(*np.nonzero(plan.inverse >= 0), strict=True):
        expected[n] += weights[n, slot] * rows[plan.inverse[n, slot]]
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=400, derandomize=True)
@given(st.integers(0, 5000), st.integers(1, 64), st.data())
def test_capacity_takes_its_factor_as_the_decimal_that_was_written(n, e, data):
    k = data.draw(st.integers(1, e))
    factor = data.draw(st.sampled_from([0.1, 0.5, 0.7, 1.0, 1.1, 1.15, 1.25, 1.3, 2.0, 2.2, 3.3]))
    expected = oracles.capacity(n, k, e, factor)
    assert NUMPY.capacity(n, None, k, e, factor) == expected
    assert int(NUMPY.capacity(n + 3, np.arange(n + 3) < n, k, e, factor)) == expected


@pytest.mark.parametrize("n, k, e, factor, rows", [(100, 1, 10, 1.1, 11), (10, 2, 4, 1.25, 7), (8, 2, 4, 0.5, 2), (3, 2, 2, 5.0, 3)])
def test_capacity_in_figures(n, k, e, factor, rows):
    assert NUMPY.capacity(n, None, k, e, factor) == oracles.capacity(n, k, e, factor) == rows
