"""Rotary positions, embeddings and the sort under them in CUDA C: the sizes and the values that conformance has not."""

import ml_dtypes
import numpy as np
import pytest
from ptx_machine.arrays import HostArrays
from ptx_machine.cupy_on_ptx import PtxLoader
from ptx_machine.schedules import SEEDS

from minimoe_cupy import embedding as embedding_module
from minimoe_cupy.embedding import CudaEmbedding
from minimoe_cupy.rope import CudaRope

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
ERRORS = {FLOAT32: 2e-6, BFLOAT16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
REFERENCE = HostArrays()


class OnPtx(CudaRope, CudaEmbedding, HostArrays):
    """The two topics, executed by the machine in one schedule."""

    name = "on_ptx"

    def __init__(self, seed):
        self.loader = PtxLoader(seed)


BACKENDS = [OnPtx(seed) for seed in SEEDS]
FIRST = BACKENDS[0]


def floats(seed, *shape, dtype=FLOAT32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def ids_of(seed, n, vocab):
    return np.random.default_rng(seed).integers(0, vocab, n).astype(np.int32)


def same_in_every_schedule(work):
    """The result of `work(backend)`, a tuple of arrays, to the bit the same in every schedule."""
    first, *others = (work(backend) for backend in BACKENDS)
    for other in others:
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first, other, strict=True))
    return first


def close(got, wanted, tolerance):
    assert got.shape == wanted.shape
    if wanted.size:
        assert np.abs(got.astype(np.float64) - wanted).max() <= tolerance * max(1.0, np.abs(wanted).max())


# ---- the sort ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 33, 1024, 2500])
@pytest.mark.parametrize("limit", [1, 3, 255, 256, 50_000, 2**31 - 1])
def test_ids_are_sorted_and_equal_ones_stay_in_order(n, limit):
    keys = ids_of(n, n, limit)
    found, turn = same_in_every_schedule(lambda b: b._sorted_keys(keys, limit))
    assert np.array_equal(turn, np.argsort(keys, kind="stable")) and np.array_equal(found, np.sort(keys))
    assert found.dtype == turn.dtype == np.int32


def test_what_names_no_row_comes_last_and_below_zero_counts_from_the_end():
    keys = np.array([3, -1, 0, 2**31 - 1, -3, -4, -(2**31), 2], np.int32)
    found, turn = FIRST._sorted_keys(keys, 3)
    assert found.tolist() == [0, 0, 2, 2, 3, 3, 3, 3] and turn.tolist() == [2, 4, 1, 7, 0, 3, 5, 6]


# ---- embedding ---------------------------------------------------------------------------------------------------------------------------


def added(dy, ids, vocab):
    """The gradient of an embedding in float64."""
    total = np.zeros((vocab, dy.shape[-1]))
    np.add.at(total, ids.reshape(-1), dy.reshape(-1, dy.shape[-1]).astype(np.float64))
    return total


@DTYPES
@pytest.mark.parametrize("n, vocab, d", [(0, 3, 7), (1, 1, 1), (33, 50_000, 7), (300, 40, 128)])
def test_an_embedding_takes_rows(n, vocab, d, dtype):
    weight, ids = floats(1, vocab, d, dtype=dtype), ids_of(2, n, vocab)
    (y,) = same_in_every_schedule(lambda b: (b.embedding(ids, weight),))
    assert np.array_equal(y, weight[ids]) and y.dtype == dtype


@DTYPES
@pytest.mark.parametrize(
    "n, vocab, d",
    [
        (0, 3, 7), (1, 1, 1), (32, 1, 8), (2048, 1, 8), (5000, 3, 1), (5000, 3, 7), (5000, 3, 128), (5000, 50_000, 1), (1500, 50_000, 128),
    ],
)  # fmt: skip
def test_a_gradient_is_each_ids_sum_whatever_the_order_of_threads(n, vocab, d, dtype):
    dy, ids = floats(3, n, d, dtype=dtype), ids_of(4, n, vocab)
    (dweight,) = same_in_every_schedule(lambda b: (b.embedding_backward(dy, ids, vocab),))
    close(dweight, added(dy, ids, vocab), ERRORS[dtype])
    assert dweight.dtype == dtype


@pytest.mark.parametrize("pieces", [1, 3, 16])
def test_long_pieces_and_runs_across_many_add_up(pieces, monkeypatch):
    monkeypatch.setattr(embedding_module, "PIECES", pieces)
    ids = np.repeat(np.array([7, 0, 2, 5, 7], np.int32), [1, 700, 64, 3, 400])
    dy = floats(5, ids.size, 5)
    (dweight,) = same_in_every_schedule(lambda b: (b.embedding_backward(dy, ids, 9),))
    close(dweight, added(dy, ids, 9), 2e-6)


def test_equal_ids_are_added_in_the_order_in_which_they_stand():
    ids = np.array([1, 0, 1, 1, 0], np.int32)
    dy = np.array([1e8, 1.0, 1.0, -1e8, 2.0], np.float32)[:, None]
    assert FIRST.embedding_backward(dy, ids, 2).ravel().tolist() == [3.0, 0.0]  # 1e8 + 1 is 1e8; another order would give 1


@DTYPES
@pytest.mark.parametrize("padding", [None, 1, -1])
@pytest.mark.parametrize("accumulate", [False, True])
def test_a_gradient_is_written_or_added_and_padding_gets_none(padding, accumulate, dtype):
    dy, ids, before = floats(6, 4, 50, 8, dtype=dtype), ids_of(7, (4, 50), 3), floats(8, 3, 8, dtype=dtype)
    out = before.copy()
    result = FIRST.embedding_backward(dy, ids, 3, padding, out, accumulate)
    wanted = added(dy, ids, 3)
    if padding is not None:
        wanted[padding] = 0.0
    assert result is out
    close(out, wanted + before.astype(np.float64) * accumulate, ERRORS[dtype])


OUTSIDE = np.array([-4, -3, -1, 0, 2, 3, 2**31 - 1, -(2**31)], np.int32)
NO_ROW = np.array([True, False, False, False, False, True, True, True])


def test_an_id_that_names_no_row_gives_nan_and_one_below_zero_counts_from_the_end():
    weight = floats(9, 3, 8)
    y = FIRST.embedding(OUTSIDE, weight)
    assert np.isnan(y[NO_ROW]).all() and np.array_equal(y[~NO_ROW], weight[OUTSIDE[~NO_ROW]])
    assert np.isnan(FIRST.embedding(OUTSIDE, weight[:0])).all()


def test_an_id_that_names_no_row_adds_nothing():
    dy = floats(10, OUTSIDE.size, 8)
    dy[NO_ROW] = np.nan
    close(FIRST.embedding_backward(dy, OUTSIDE, 3), added(dy[~NO_ROW], OUTSIDE[~NO_ROW], 3), 1e-6)
    assert FIRST.embedding_backward(dy, OUTSIDE, 0).shape == (0, 8)


@pytest.mark.parametrize("dtype", [np.dtype(np.float64), FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("n, shape", [(0, (3, 2)), (200, (3,)), (200, (4, 2, 5)), (40, (2, 0))])
def test_scatter_add_adds_to_what_is_there(n, shape, dtype):
    target, index, values = floats(11, *shape, dtype=dtype), ids_of(12, n, shape[0]), floats(13, n, *shape[1:], dtype=dtype)
    wanted = target.astype(np.float64)
    np.add.at(wanted, index, values.astype(np.float64))

    def work(backend):
        result = target.copy()
        backend.scatter_add(result, index, values)
        return (result,)

    (got,) = same_in_every_schedule(work)
    close(got, wanted, {**ERRORS, np.dtype(np.float64): 1e-14}[dtype])


def test_scatter_add_reaches_a_target_that_is_not_contiguous():
    whole = np.zeros((4, 6), np.float32)
    FIRST.scatter_add(whole.T[::2], np.array([0, 2, 0], np.int32), np.ones((3, 4), np.float32))
    assert whole.sum(axis=0).tolist() == [8.0, 0.0, 0.0, 0.0, 4.0, 0.0]


# ---- rope --------------------------------------------------------------------------------------------------------------------------------


def turned(x, positions, inv_freq, scale=1.0, interleaved=False, turn=1.0):
    """x turned in float64 by angles that are rounded to float32, as the reference in float32 rounds them."""
    angle = (positions.astype(np.float32)[:, :, None, None] * inv_freq).astype(np.float64)
    c, s, p, y = np.cos(angle) * scale, np.sin(angle) * scale * turn, inv_freq.size, x.astype(np.float64)
    first, second = (slice(0, 2 * p, 2), slice(1, 2 * p, 2)) if interleaved else (slice(0, p), slice(p, 2 * p))
    a, b = y[..., first].copy(), y[..., second].copy()
    y[..., first], y[..., second] = a * c - b * s, b * c + a * s
    return y


def frequencies(pairs):
    return (10_000.0 ** -np.linspace(0.0, 1.0, pairs)).astype(np.float32)


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "b, t, heads, c, pairs", [(1, 9, 3, 6, 3), (2, 5, 10, 64, 32), (2, 3, 1, 64, 16), (1, 40, 2, 128, 64), (1, 70, 1, 2, 1)]
)
def test_far_positions_turn_as_in_float64(b, t, heads, c, pairs, interleaved, dtype):
    x, inv_freq = floats(14, b, t, heads, c, dtype=dtype), frequencies(pairs)
    positions = (131_072 - np.arange(b * t).reshape(b, t) * 37).astype(np.int32)
    options = positions, inv_freq, 1.25, interleaved
    y, dx = same_in_every_schedule(lambda backend: (backend.rope(x, *options), backend.rope_backward(x, *options)))
    close(y, turned(x, *options), ERRORS[dtype])
    close(dx, turned(x, *options, turn=-1.0), ERRORS[dtype])


def test_cosine_and_sine_are_exact_to_the_last_bits_for_every_size_of_angle():
    sizes = np.arange(1500), np.linspace(0, 131_072, 1500), -np.arange(100), 2.0 ** np.arange(31)
    positions = np.unique(np.concatenate(sizes)).astype(np.int32)
    x, inv_freq = np.zeros((1, positions.size, 1, 8), np.float32), np.array([1.0, 0.1, 1.5707964, 3e-5], np.float32)
    x[..., :4] = 1.0
    y = FIRST.rope(x, positions[None], inv_freq)
    angle = (positions.astype(np.float32)[:, None] * inv_freq).astype(np.float64)
    error = np.abs(y[0, :, 0] - np.concatenate([np.cos(angle), np.sin(angle)], axis=1)).max(axis=1)
    assert error[np.abs(positions) <= 2**26].max() < 1.2e-7 and error.max() < 5e-7


def test_an_angle_without_a_value_gives_nan():
    y = FIRST.rope(np.ones((1, 2, 1, 2), np.float32), np.array([[0, 1]], np.int32), np.array([np.inf], np.float32))
    assert np.isnan(y).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_may_write_where_it_reads(interleaved):
    x, positions, inv_freq = floats(15, 2, 7, 3, 24), np.arange(7, dtype=np.int32)[None], frequencies(8)
    inout_x = x.copy()
    assert FIRST.rope(inout_x, positions, inv_freq, 1.0, interleaved, inout_x) is inout_x
    close(inout_x, turned(x, positions, inv_freq, 1.0, interleaved), 2e-6)


@DTYPES
@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("b, t, heads, groups, c", [(2, 0, 2, 1, 8), (1, 1, 1, 1, 2), (2, 5, 3, 1, 6), (1, 7, 8, 2, 64), (2, 3, 4, 4, 128)])
def test_heads_are_cut_turned_and_joined_again(b, t, heads, groups, c, turn, dtype):
    qkv, inv_freq = floats(16, b, t, (heads + 2 * groups) * c, dtype=dtype), frequencies(c // 2) if turn else None
    positions = (np.arange(t)[None] + np.array([[100_000], [7]])[:b]).astype(np.int32)

    def work(backend):
        parts = backend.split_heads(qkv, positions, inv_freq, heads=heads, groups=groups)
        return *parts, backend.split_heads_backward(*parts, positions, inv_freq)

    q, k, v, again = same_in_every_schedule(work)
    rows = qkv.reshape(b, t, heads + 2 * groups, c)
    wanted = rows.astype(np.float64)
    if turn:
        wanted = np.concatenate([turned(rows[:, :, : heads + groups], positions, inv_freq), wanted[:, :, heads + groups :]], axis=2)
    for part, first, last in ((q, 0, heads), (k, heads, heads + groups), (v, heads + groups, heads + 2 * groups)):
        close(part, wanted[:, :, first:last], ERRORS[dtype])
    close(again, qkv.astype(np.float64), 2 * ERRORS[dtype])  # the gradient turns back what was turned


def test_other_dtypes_are_the_references():
    x, positions, inv_freq = floats(17, 1, 3, 2, 4, dtype=np.float64), np.arange(3, dtype=np.int32)[None], np.array([1.0, 0.1])
    assert np.array_equal(FIRST.rope(x, positions, inv_freq), REFERENCE.rope(x, positions, inv_freq))
    ids, weight = np.array([1, 0, 1], np.int64), floats(18, 2, 4)
    assert np.array_equal(FIRST.embedding(ids, weight), weight[ids])
    close(FIRST.embedding_backward(floats(19, 3, 4, dtype=np.float64), ids.astype(np.int32), 2), added(floats(19, 3, 4), ids, 2), 1e-6)


# ---- what is refused ---------------------------------------------------------------------------------------------------------------------

X, POSITIONS, FREQUENCIES = np.zeros((2, 3, 4, 8), np.float32), np.zeros((1, 3), np.int32), np.ones(4, np.float32)
IDS, ROWS = np.zeros(5, np.int32), np.zeros((5, 8), np.float32)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda b: b.rope(X, POSITIONS[:, :2], FREQUENCIES), r"rope: positions has the shape \(1, 2\): wanted \(1, 3\)"),
        (lambda b: b.rope_backward(X, np.zeros((3, 3), np.int32), FREQUENCIES), r"positions has the shape \(3, 3\): wanted \(2, 3\)"),
        (lambda b: b.rope(X, POSITIONS, np.ones(5, np.float32)), r"rope: inv_freq is \[5\]: wanted at most \[4\]"),
        (lambda b: b.rope(X, POSITIONS, FREQUENCIES, out=X[:1]), r"rope: out has the shape \(1, 3, 4, 8\): wanted \(2, 3, 4, 8\)"),
        (lambda b: b.split_heads(X[0], POSITIONS, None, heads=2, groups=2), r"qkv has the shape \(3, 4, 8\): wanted \(3, 4, 6\)"),
        (lambda b: b.split_heads_backward(X, X, X[:, :, :2], POSITIONS, None), r"dv has the shape \(2, 3, 2, 8\): wanted \(2, 3, 4, 8\)"),
        (lambda b: b.embedding(IDS, ROWS, out=ROWS[:4]), r"embedding: out has the shape \(4, 8\): wanted \(5, 8\)"),
        (lambda b: b.embedding_backward(ROWS[:4], IDS, 3), r"embedding_backward: dy has the shape \(4, 8\): wanted \(5, 8\)"),
        (lambda b: b.embedding_backward(ROWS, IDS, 3, out=ROWS), r"embedding_backward: out has the shape \(5, 8\): wanted \(3, 8\)"),
        (lambda b: b.scatter_add(ROWS, IDS, ROWS[:, :4]), r"scatter_add: values has the shape \(5, 4\): wanted \(5, 8\)"),
        (lambda b: b.scatter_add(ROWS, IDS, ROWS.astype(np.float64)), "values is float64"),
        (lambda b: b.scatter_add(ROWS, IDS.astype(np.int64), ROWS), "keys is int64"),
        (lambda b: b.scatter_add(IDS, IDS, IDS), "inout_target is int32: wanted one of float32, bfloat16, float64"),
    ],
)
def test_an_argument_that_does_not_fit_is_refused(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call(FIRST)
