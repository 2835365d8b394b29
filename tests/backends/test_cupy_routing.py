"""The CuPy backend's gates, plans and loads, on the processor: odd sizes, ties, NaN, padding, capacity; compared with the reference."""

import re
from itertools import cycle

import numpy as np
import pytest
from ptx_machine.arrays import HostArrays
from ptx_machine.cupy_on_ptx import PtxLoader
from ptx_machine.schedules import SEEDS

from minimoe.backend import load
from minimoe.reference.gating import Rule
from minimoe.reference.routers import sum_valid
from minimoe_cupy.gating import CudaGating
from minimoe_cupy.loader import KERNELS
from minimoe_cupy.routing import ROUTE, CudaRouting
from minimoe_cupy.selection import LAYOUTS, layout
from minimoe_numpy import NumpyBackend

REFERENCE = load("numpy")
RULES = {
    "softmax_topk": lambda k, e: Rule("softmax_topk", k),
    "not normalised": lambda k, e: Rule("softmax_topk", k, norm=False),
    "topk_softmax": lambda k, e: Rule("topk_softmax", k),
    "noisy_topk": lambda k, e: Rule("noisy_topk", k),
    "switch": lambda k, e: Rule("switch", 1),
    "sigmoid_bias": lambda k, e: Rule("sigmoid_bias", k, route_scale=2.5),
    "groups": lambda k, e: Rule("sigmoid_bias", k, n_groups=e // 2, top_groups=max(1, e // 4), norm=False),
}
SIZES = [(1, 1, 1), (31, 3, 2), (33, 8, 8), (31, 64, 40), (9, 256, 8), (5, 68, 3), (5, 70, 5), (3, 400, 2), (2, 1024, 3), (2, 1023, 2)]


class OnPtx(CudaGating, CudaRouting, HostArrays):
    name = "routing half of cupy"

    def __init__(self, seed=SEEDS[0]):
        self.loader = PtxLoader(seed)


BACKENDS = {seed: OnPtx(seed) for seed in SEEDS}
FIRST = BACKENDS[SEEDS[0]]


class OnProbabilities(NumpyBackend):
    """The reference, handed p in the place of logits: two ways to round p must not choose differently."""

    def softmax(self, x):
        return x


def close(ours, theirs):
    """Within 1e-5 of the largest finite value expected; NaN where the reference has it."""
    with np.errstate(all="ignore"):
        theirs = np.asarray(theirs, np.float64)
        finite = np.abs(theirs[np.isfinite(theirs)])
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    assert np.allclose(ours, theirs, rtol=0.0, atol=1e-5 * max(1e-30, finite.max(initial=0.0)), equal_nan=True)


def logits_of(n, e, seed=0):
    """Multiples of 1/4, so with ties; the middle one of several rows holds a NaN."""
    z = np.round(4.0 * np.random.default_rng([seed, n, e]).standard_normal((n, e))).astype(np.float32) / 4.0
    if n > 2:
        z[n // 2, e // 2] = np.nan
    return z


def masks_of(n):
    return None, np.arange(n) % 3 != 1, np.zeros(n, dtype=bool)


def reference_gate(z, bias, valid, rule):
    with np.errstate(all="ignore"):
        gate = REFERENCE.gate(z, bias, valid, rule=rule)
        wide = REFERENCE.gate(z.astype(np.float64), None if bias is None else bias.astype(np.float64), valid, rule=rule)
    return gate._replace(prob_sum=wide.prob_sum)


# ---- gates -------------------------------------------------------------------------------------------------------------------------------


def check_gate(backend, z, bias, valid, rule):
    """Tokens choose experts as in the reference.   -> the kernels' gate"""
    ours, theirs = backend.gate(z, bias, valid, rule=rule), reference_gate(z, bias, valid, rule)
    assert np.array_equal(ours.ids, theirs.ids) and np.array_equal(ours.counts, theirs.counts)
    assert ours.ids.dtype == ours.counts.dtype == np.int32
    for mine, wanted in zip(ours[::2], theirs[::2], strict=True):  # weights, scores, sums
        close(mine, wanted)
    return ours


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("n, e, k", SIZES)
def test_a_gate_and_its_backward_are_the_references(n, e, k, name):
    if name == "groups" and (e % 4 or k > 2 * max(1, e // 4)):
        k, e = 2, 4 * -(-e // 4)
    rule, z = RULES[name](k, e), logits_of(n, e)
    bias = np.linspace(-0.3, 0.3, e).astype(np.float32) if rule.router == "sigmoid_bias" else None
    draw = np.random.default_rng(1)
    for valid, backend in zip(masks_of(n), cycle(BACKENDS.values()), strict=False):
        ours = check_gate(backend, z, bias, valid, rule)
        dweights, dsum = (draw.standard_normal(shape).astype(np.float32) for shape in (ours.weights.shape, (e,)))
        for given in [(dweights, dsum), (dweights, None), (None, dsum)]:
            with np.errstate(all="ignore"):
                wanted = REFERENCE.gate_backward(*given, ours, valid, rule=rule)
            close(backend.gate_backward(*given, ours, valid, rule=rule), wanted)


def check_choice(backend, z, valid, rule):
    """Experts choose tokens as in the reference.   -> the kernels' gate"""
    ours = backend.gate(z, None, valid, rule=rule)
    wanted = OnProbabilities().gate(ours.scores, None, valid, rule=rule)
    close(ours.scores, reference_gate(z, None, valid, rule).scores)
    for mine, other in zip(ours[:4], wanted[:4], strict=True):
        assert np.array_equal(mine, other, equal_nan=mine.dtype == np.float32) and mine.dtype == other.dtype
    close(ours.prob_sum, sum_valid(REFERENCE, ours.scores.astype(np.float64), valid))
    return ours


@pytest.mark.parametrize("n, e, k", [(1, 1, 1), (31, 3, 2), (33, 8, 8), (1100, 3, 1), (33, 68, 5)])
def test_experts_choose_as_in_the_reference_where_padding_and_nan_come_last(n, e, k):
    rule, z = Rule("expert_choice", k), logits_of(n, e)
    z[n // 3 :: 2] = z[n // 3]  # whole rows alike: ties across all pieces of tokens
    for valid, backend in zip(masks_of(n), cycle(BACKENDS.values()), strict=False):
        ours = check_choice(backend, z, valid, rule)
        if n < 100:
            dweights, dsum = np.random.default_rng(2).standard_normal((n, e)).astype(np.float32), np.linspace(-1, 1, e).astype(np.float32)
            wanted = REFERENCE.gate_backward(dweights, dsum, ours, valid, rule=rule)
            close(backend.gate_backward(dweights, dsum, ours, valid, rule=rule), wanted)


def test_many_tokens_are_added_over_warps_and_blocks():
    z = logits_of(1000, 8)
    z[500] = 0.0
    ours, theirs = FIRST.gate(z, None, None, rule=Rule("switch", 1)), reference_gate(z, None, None, Rule("switch", 1))
    close(ours.prob_sum, theirs.prob_sum)
    assert np.array_equal(ours.counts, theirs.counts) and ours.counts.sum() == 1000


def test_arrays_that_begin_between_multiples_of_16_bytes_and_no_tokens_do():
    z = np.empty(3 * 72 + 1, np.float32)[1:].reshape(3, 72)
    z[:] = logits_of(3, 72)
    rule = Rule("softmax_topk", 4)
    assert layout(72, z) == (8, 1) and layout(72, np.zeros((3, 72), np.float32)) == (4, 4)
    assert np.array_equal(FIRST.gate(z, None, None, rule=rule).ids, REFERENCE.gate(z, None, None, rule=rule).ids)
    none = FIRST.gate(z[:0], None, None, rule=rule)
    assert none.weights.shape == (0, 4) and not none.counts.any() and not none.prob_sum.any()


@pytest.mark.parametrize("columns", [1, 32, 33, 64, 65, 68, 128, 129, 256, 257, 260, 512, 1023, 1024])
def test_every_row_up_to_the_most_columns_has_a_layout(columns):
    held, v = layout(columns, np.zeros(columns, np.float32))
    assert (held, v) in LAYOUTS and 32 * held >= columns and columns % v == 0


def test_what_no_warp_can_hold_and_float64_are_the_references():
    for z in (np.zeros((2, 1025), np.float32), np.zeros((2, 8))):
        gate = FIRST.gate(z, None, None, rule=Rule("softmax_topk", 2))
        assert gate.scores.dtype == z.dtype and np.array_equal(gate.ids, [[0, 1]] * 2)


# ---- plans -------------------------------------------------------------------------------------------------------------------------------


def pairs_of(n, e, k, kind):
    draw = np.random.default_rng([n, e, k])
    ids = np.argsort(draw.random((n, e)), axis=1)[:, :k].astype(np.int32)
    if kind == "one expert":
        ids = np.full((n, k), e - 1, np.int32)
    elif kind == "an empty expert, and none":
        ids = np.where((ids == 0) | (draw.random(ids.shape) < 0.2), -1, ids).astype(np.int32)
    weights = np.round(draw.random((n, k)) * 8.0).astype(np.float32) / 8.0 - 0.25  # ties, both signs
    if n > 2:
        weights[n // 2] = np.nan
    return ids, weights


def same_plan(ours, theirs):
    """The same in all that is ever read; unused rows hold what an index may be."""
    used = theirs.offsets[-1]
    assert {part.dtype for part in ours} == {np.dtype(np.int32)}
    assert np.array_equal(ours.offsets, theirs.offsets) and np.array_equal(ours.inverse, theirs.inverse)
    assert np.array_equal(ours.order[:used], theirs.order[:used]) and len(ours.order) == len(theirs.order)
    assert ((ours.order >= 0) & (ours.order < ours.inverse.size)).all()


@pytest.mark.parametrize("kind", ["spread", "one expert", "an empty expert, and none"])
@pytest.mark.parametrize("n, e, k", [(1, 1, 1), (31, 3, 2), (33, 8, 8), (1000, 3, 3), (33, 64, 5), (9, 256, 256), (5, 1024, 3)])
def test_a_plan_is_the_references(n, e, k, kind):
    ids, weights = pairs_of(n, e, k, kind)
    capacities = [(None, "position"), (2, "position"), (np.array(3), "position"), (2, "probability"), (np.array(n // 2), "probability")]
    if e <= 8:
        capacities += [(0, "position"), (0, "probability"), (n * k, "probability")]
    for i, (capacity, priority) in enumerate(capacities):
        options = {"n_experts": e, "rows": n * k, "capacity": capacity, "priority": priority}
        backend, valid = BACKENDS[SEEDS[i % len(SEEDS)]], masks_of(n)[(i + 1) % 2]
        same_plan(backend.route(ids, weights, valid, **options), REFERENCE.route(ids, weights, valid, **options))


def test_nothing_valid_gives_an_empty_plan():
    ids, weights = pairs_of(31, 8, 2, "spread")
    for priority in ("position", "probability"):
        options = {"n_experts": 8, "rows": 62, "capacity": 4, "priority": priority}
        plan = FIRST.route(ids, weights, np.zeros(31, dtype=bool), **options)
        assert not plan.offsets.any() and not plan.order.any() and (plan.inverse == -1).all()


def test_a_choice_by_experts_has_rows_for_what_is_chosen_alone():
    choice = np.where(np.arange(60).reshape(20, 3) % 4 == 0, np.arange(3), -1).astype(np.int32)
    options = {"n_experts": 3, "rows": 15}
    same_plan(FIRST.route(choice, np.ones((20, 3), np.float32), None, **options), REFERENCE.route(choice, None, None, **options))


@pytest.mark.parametrize("priority", ["position", "probability"])
def test_ids_that_are_no_expert_and_rows_that_do_not_suffice_are_left_out(priority):
    ids = np.array([[0, 7], [-5, 1], [1, 0], [2**30, 1]], np.int32)
    weights = np.ones((4, 2), np.float32)
    plan = FIRST.route(ids, weights, None, n_experts=2, rows=4, capacity=9, priority=priority)
    assert np.array_equal(plan.offsets, [0, 2, 5]) and np.array_equal(plan.order, [0, 5, 3, 4])
    assert np.array_equal(plan.inverse, [[0, -1], [-1, 2], [3, 1], [-1, -1]])


@pytest.mark.parametrize("seed", SEEDS)
def test_counts_of_more_blocks_than_threads_are_scanned(seed):
    counts = np.random.default_rng(0).integers(0, 9, (2, 700)).astype(np.int32)
    starts, totals = counts.copy(), np.zeros(2, np.int32)
    BACKENDS[seed]._launch(ROUTE, "route_scan", 2, 256, starts, totals, 700)
    assert np.array_equal(starts, np.cumsum(counts, axis=1) - counts) and np.array_equal(totals, counts.sum(axis=1))


# ---- the load of noisy routing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, e, k", [(1, 3, 1), (31, 8, 7), (33, 64, 2), (5, 68, 40), (3, 256, 8), (3, 1023, 2), (2, 1024, 3)])
def test_a_noisy_load_and_its_backward_are_the_references(n, e, k):
    draw = np.random.default_rng([n, e, k])
    noisy = logits_of(n, e)
    clean, sigma = (np.abs(draw.standard_normal((n, e))).astype(np.float32) + 0.5 for _ in range(2))
    dload = draw.standard_normal(e).astype(np.float32)
    for valid, backend in zip(masks_of(n), cycle(BACKENDS.values()), strict=False):
        args = clean, noisy, sigma
        load_, ids = backend.noisy_load(*args, valid, k=k)
        wanted, wanted_ids = REFERENCE.noisy_load(*(a.astype(np.float64) for a in args), valid, k=k)
        assert np.array_equal(ids, wanted_ids) and ids.dtype == np.int32
        close(load_, wanted)
        gradients = backend.noisy_load_backward(dload, *args, ids, valid, k=k)
        for mine, other in zip(gradients, REFERENCE.noisy_load_backward(dload, *args, ids, valid, k=k), strict=True):
            close(mine, other)


# ---- what is refused ---------------------------------------------------------------------------------------------------------------------

Z, MASK, RULE = np.zeros((4, 8), np.float32), np.ones(4, dtype=bool), Rule("softmax_topk", 2)
GATE = REFERENCE.gate(Z, None, None, rule=RULE)
GROUPS = Rule("sigmoid_bias", 2, n_groups=3)
IDS, ONES = np.zeros((4, 2), np.int32), np.ones((4, 2), np.float32)
PLAN = {"n_experts": 3, "rows": 8}


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda b: b.gate(Z, None, MASK[:3], rule=RULE), r"gate: valid has the shape \(3,\): wanted \(4,\)"),
        (lambda b: b.gate(Z, None, MASK.astype(np.int64), rule=RULE), "valid is int64"),
        (lambda b: b.gate(Z, Z[0, :5], None, rule=Rule("sigmoid_bias", 2)), "gate: bias has the shape"),
        (lambda b: b.gate(Z, None, None, rule=Rule("softmax_topk", 9)), r"gate: top_k \(9\) must be 1 to 8"),
        (lambda b: b.gate(Z, None, None, rule=GROUPS), "gate: 8 experts in 3 groups"),
        (lambda b: b.gate(Z[0], None, None, rule=RULE), "unpack"),
        (lambda b: b.gate_backward(ONES[:3], None, GATE, None, rule=RULE), "gate_backward: dweights has the shape"),
        (lambda b: b.gate_backward(ONES, Z[0, :3], GATE, None, rule=RULE), "gate_backward: dprob_sum has the shape"),
        (lambda b: b.gate_backward(ONES, None, GATE._replace(ids=GATE.ids.astype(np.int64)), None, rule=RULE), "ids is int64"),
        (lambda b: b.route(IDS.astype(np.int64), ONES, None, **PLAN), "ids is int64"),
        (lambda b: b.route(IDS, ONES, MASK[:2], **PLAN), "route: valid has the shape"),
        (lambda b: b.route(IDS, ONES[:2], None, **PLAN, capacity=1, priority="probability"), "route: weights has the shape"),
        (lambda b: b.route(IDS, ONES, None, **PLAN, capacity=1.5), "route: capacity must be an integer"),
        (lambda b: b.route(IDS, ONES, None, **PLAN, capacity=np.ones(2, np.int64)), "route: capacity has the shape"),
        (lambda b: b.noisy_load(Z, Z, Z[:3], None, k=2), "noisy_load: sigma has the shape"),
        (lambda b: b.noisy_load(Z, Z, Z, None, k=8), r"noisy_load: k \(8\) must be 1 to 7"),
        (lambda b: b.noisy_load_backward(Z[0], Z, Z, Z, IDS, None, k=2), "noisy_load_backward: ids has the shape"),
        (lambda b: b.noisy_load_backward(Z[0], Z, Z, Z, np.zeros((4, 3)), None, k=2), "ids is float64"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call(FIRST)


# ---- the diagram of kernels/select.cuh ------------------------------------------------------------------------------------------------


def test_the_diagram_of_a_warps_choice_shows_what_the_butterflies_do():
    steps = re.findall(r"^// +(start|offset \d+) +([.#ab]{32})", (KERNELS / "select.cuh").read_text(), re.M)
    assert [name for name, _ in steps] == 2 * ["start", *(f"offset {offset}" for offset in (16, 8, 4, 2, 1))]
    for combine, order in ((max, ".#"), (min, "ab.")):  # the largest key, then the lowest column: symbols from the least
        part = steps[:6] if combine is max else steps[6:]
        held = [order.index(symbol) for symbol in part[0][1]]
        for name, shown in part[1:]:
            offset = int(name.split()[1])
            held = [combine(held[lane], held[lane ^ offset]) for lane in range(32)]
            assert "".join(order[value] for value in held) == shown, name
    z = np.zeros((1, 32), np.float32)
    z[0, [3, 18]] = 2.5
    assert FIRST.gate(z, None, None, rule=Rule("topk_softmax", 2)).ids.tolist() == [[3, 18]]
