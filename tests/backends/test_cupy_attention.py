"""Attention of the backend `cupy`, executed on the processor: odd lengths, caches, windows, padding, sinks, heads of any width, groups."""

from typing import NamedTuple

import numpy as np
import pytest
from ptx_machine.arrays import BFLOAT16, HostArrays
from ptx_machine.cupy_on_ptx import PtxLoader
from ptx_machine.schedules import SEEDS

from minimoe.reference.random import Draw
from minimoe.testing.tolerances import KERNELS
from minimoe_cupy import attention
from minimoe_cupy.attention import CudaAttention, covered
from minimoe_numpy import NumpyBackend

EVERY_CARD = 99 * 1024  # bytes of shared memory that a block may have on any card of compute capability 8.0 or newer
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16}


class Attending(CudaAttention, HostArrays):
    name = "attending"

    def __init__(self, seed):
        self.loader = PtxLoader(seed)


BACKENDS = {seed: Attending(seed) for seed in SEEDS}
FIRST = BACKENDS[SEEDS[0]]
REFERENCE = NumpyBackend()


class Shape(NamedTuple):
    """A call: batch, tokens, heads, widths, and what is asked of it."""

    b: int
    tq: int
    tk: int
    queries: int
    groups: int
    c: int
    cv: int
    causal: bool = True
    window: int = 0
    padding: str = ""  # left: the first keys of the last sequence do not count; right: the last ones; holes: every third
    sinks: bool = False
    shuffled: bool = False  # keys in the order of a rolling cache


SHAPES = [
    Shape(1, 1, 1, 1, 1, 8, 8),
    Shape(2, 1, 130, 4, 1, 8, 8, padding="right"),
    Shape(1, 31, 31, 3, 3, 20, 20, window=7),
    Shape(2, 33, 33, 3, 1, 8, 20, padding="left", sinks=True),
    Shape(2, 33, 33, 2, 2, 20, 7, padding="left"),
    Shape(1, 31, 65, 4, 1, 64, 64, shuffled=True, window=20),
    Shape(1, 65, 65, 1, 1, 64, 40, causal=False, window=9, padding="right"),
    Shape(1, 33, 130, 1, 1, 96, 96),
    Shape(1, 65, 33, 2, 2, 128, 128, causal=False, sinks=True),
    Shape(1, 33, 31, 1, 1, 64, 128, causal=False),
    Shape(1, 130, 130, 3, 1, 8, 8, sinks=True),
    Shape(2, 33, 130, 2, 1, 8, 8, padding="holes"),
    Shape(1, 2, 2100, 1, 1, 4, 4, window=40),  # more tiles than are looked at together, of keys
    Shape(1, 700, 700, 3, 1, 4, 4, window=3),  # and of rows
]


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def call(shape, dtype):
    """Inputs in that dtype, and the options."""
    b, tq, tk, queries, groups, c, cv = shape[:7]
    arrays = [a.astype(DTYPES[dtype]) for a in (normal(1, b, tq, queries, c), normal(2, b, tk, groups, c), normal(3, b, tk, groups, cv))]
    k_pos = np.arange(tk, dtype=np.int32)[None]
    q_pos = np.arange(max(tk - tq, 0), max(tk - tq, 0) + tq, dtype=np.int32)[None]
    options = {"scale": c**-0.5, "causal": shape.causal, "window": shape.window, "q_pos": q_pos, "k_pos": k_pos}
    if shape.shuffled:
        options["k_pos"] = np.roll(k_pos, 11, axis=1).repeat(b, axis=0)
    if shape.padding:
        valid = np.ones((b, tk), np.bool_)
        valid[-1, {"left": slice(5), "right": slice(tk - 5, tk), "holes": slice(1, None, 3)}[shape.padding]] = False
        options["k_valid"] = valid
    if shape.sinks:
        options["sinks"] = normal(4, queries)
    return arrays, options


def doubled(values):
    return [a.astype(np.float64) for a in values]


def forward_and_backward(backend, arrays, options, dy):
    y, logsumexp = backend.attention(*arrays, **options)
    return y, logsumexp, *(a for a in backend.attention_backward(dy, *arrays, y, logsumexp, **options) if a is not None)


def both(shape, dtype, seed=SEEDS[0]):
    """Return the kernels' results: y, logsumexp, dq, dk, dv and, with sinks, dsinks."""
    arrays, options = call(shape, dtype)
    dy = normal(5, shape.b, shape.tq, shape.queries, shape.cv).astype(DTYPES[dtype])
    return forward_and_backward(BACKENDS[seed], arrays, options, dy)


def expected(shape, dtype):
    """The same from the reference in float64, of the inputs as the dtype holds them; backward from the kernels' y, as it is rounded."""
    arrays, options = call(shape, dtype)
    dy = normal(5, shape.b, shape.tq, shape.queries, shape.cv).astype(DTYPES[dtype])
    if shape.sinks:
        options["sinks"] = options["sinks"].astype(np.float64)
    with np.errstate(all="ignore"):
        return forward_and_backward(REFERENCE, doubled(arrays), options, dy.astype(np.float64))


def check_close(got, wanted, tolerance):
    """Infinities where expected, else within the tolerance of the largest value."""
    got = got.astype(np.float64)
    finite = np.isfinite(wanted)
    assert np.array_equal(got[~finite], wanted[~finite])
    most = max(np.abs(wanted[finite]).max(initial=0.0), 0.1)
    assert np.abs(got[finite] - wanted[finite]).max(initial=0.0) <= tolerance * most


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [pytest.param(shape, id=f"{i}") for i, shape in enumerate(SHAPES)])
def test_attention_is_the_references_in_every_schedule_to_the_bit(shape, dtype):
    first, *others = (both(shape, dtype, seed) for seed in SEEDS)
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert one.tobytes() == two.tobytes()
    arrays = call(shape, dtype)[0]
    like = (arrays[2].dtype, np.float32, *(a.dtype for a in arrays), np.float32)
    for i, (got, wanted) in enumerate(zip(first, expected(shape, dtype), strict=True)):
        assert got.dtype == like[i] and got.shape == wanted.shape and got.flags.c_contiguous
        check_close(got, wanted, KERNELS[dtype])


def check_own_keys(backend, c, before, dtype):
    """Tokens that see their own key alone get its value. With `before` keys before the first token, each has another place in its tile."""
    arrays, options = call(Shape(1, 128, 128 + before, 1, 1, c, c, window=1), dtype)
    y, _ = backend.attention(*arrays, **options)
    check_close(y, arrays[2][:, before:].astype(np.float64), KERNELS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("before", range(0, 64, 8))
@pytest.mark.parametrize("c", [8, 64])
def test_a_token_sees_its_own_key_wherever_that_is_in_a_tile(c, before, dtype):
    check_own_keys(FIRST, c, before, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_sees_nothing_gives_zero_and_takes_no_part_in_gradients(dtype):
    shape = Shape(2, 33, 33, 3, 1, 8, 20, padding="left")
    y, logsumexp, dq, dk, dv = both(shape, dtype)
    assert not y[1, :5].any() and np.isneginf(logsumexp[1, :, :5]).all() and not dq[1, :5].any()
    assert not dk[1, :5].any() and not dv[1, :5].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [64, 128])
def test_sums_follow_a_maximum_that_rises_from_tile_to_tile(c, dtype):
    (q, k, v), options = call(Shape(1, 65, 330, 1, 1, c, c, causal=False), dtype)
    q[:, ::3] *= 0.1  # rows in which it rises by little, in a warp with rows in which it rises by much
    k = (k.astype(np.float32) * np.linspace(0.1, 20, 330)[:, None, None]).astype(k.dtype)
    wide = doubled((q, k, v))
    dy = normal(5, *q.shape).astype(q.dtype)
    results = forward_and_backward(FIRST, (q, k, v), options, dy)
    y, logsumexp = REFERENCE.attention(*wide, **options)
    gradients = REFERENCE.attention_backward(dy.astype(np.float64), *wide, results[0].astype(np.float64), logsumexp, **options)
    scores = options["scale"] * np.einsum("thc,jhc->tj", wide[0][0], wide[1][0])
    rises = np.diff(np.maximum.accumulate(scores, axis=1)[:, ::64], axis=1).max(axis=1)
    assert rises.min() < 2 and rises.max() > 20
    for got, wanted in zip(results, (y, logsumexp, *gradients[:3]), strict=True):
        check_close(got, wanted, KERNELS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [8, 20, 7])
def test_a_result_is_written_where_it_is_wanted_and_inputs_may_be_views(c, dtype):
    (q, k, v), options = call(Shape(1, 5, 9, 2, 1, c, c), dtype)
    y, logsumexp = FIRST.attention(q, k, v, **options)
    joined = np.concatenate([k, v], axis=2)
    out = np.full(y.shape, np.nan, y.dtype)
    again, other = FIRST.attention(q, joined[:, :, :1], joined[:, :, 1:], out=out, **options)
    assert again is out and out.tobytes() == y.tobytes() and other.tobytes() == logsumexp.tobytes()


def test_what_the_kernels_do_not_take_goes_to_the_reference():
    (q, k, v), options = call(Shape(1, 5, 5, 2, 1, 136, 8), "float32")
    drop = {**options, "dropout": 0.5, "rng": Draw(7, 11, 0, 3)}
    for arrays, given in (((q, k, v), options), ((q[..., :8], k[..., :8], v), drop)):
        assert np.array_equal(FIRST.attention(*arrays, **given)[0], REFERENCE.attention(*arrays, **given)[0])


@pytest.mark.parametrize(
    "changed",
    [
        {"q": np.zeros((2, 5, 2, 8), np.float32)}, {"k": np.zeros((1, 4, 1, 8), np.float32)}, {"v": np.zeros((1, 5, 1, 8))},
        {"q": np.zeros((1, 5, 2, 7), np.float32)}, {"q": np.zeros((1, 5, 3, 8), np.float32), "k": np.zeros((1, 5, 2, 8), np.float32)},
        {"q_pos": np.zeros((1, 4), np.int32)}, {"k_pos": np.zeros((1, 5), np.int64)}, {"k_pos": np.zeros((3, 5), np.int32)},
        {"k_valid": np.ones((1, 5), np.int32)}, {"sinks": np.zeros(3, np.float32)}, {"scale": 0.0}, {"window": -1},
    ],
)  # fmt: skip
def test_shapes_and_dtypes_that_do_not_fit_never_reach_a_kernel(changed):
    (q, k, v), options = call(Shape(1, 5, 5, 2, 1, 8, 8), "float32")
    del options["causal"]
    given = {"q": q, "k": k, "v": v, "k_valid": None, "sinks": None, **options}
    assert covered(**given) and not covered(**{**given, **changed})


@pytest.mark.parametrize("kernels", [attention.FORWARD, attention.DQ, attention.DKV])
def test_every_card_has_the_shared_memory_that_is_asked_for(kernels):
    assert max(kernel.shared for kernel in kernels.values()) <= EVERY_CARD
