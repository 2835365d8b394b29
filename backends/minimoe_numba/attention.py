"""Attention, a few query rows at a time: scores, softmax and the product with the values stay in a core's cache.

A unit of work is one key/value head of one sequence with all the query heads that read it. Its queries are scaled and packed in blocks of
rows (head, token). A block is multiplied with the keys that any of its rows may see, so a causal model does about half the work. Only the
scores of one block are in memory, which therefore grows with T, not with its square. Backward computes them again from logsumexp.
Formulas: minimoe/reference/attention.py.

Masks become two bounds: a query sees key j if low <= position[j] <= high, and a key that is not valid has a position above every bound.
"""

import numpy as np

from minimoe.backend import Array
from minimoe.reference.random import Draw
from minimoe_numba.arrays import NO_FLOATS, singles
from minimoe_numba.compiling import compiled, inlined
from minimoe_numba.creation import contiguous, empty
from minimoe_numba.kernel import F1, F3, F4, I2, L1, address, kernel
from minimoe_numba.machine import machine
from minimoe_numba.maths import INFINITY, ONE, ZERO, exp, largest
from minimoe_numba.native import PLAIN, TRANSPOSED, call_sgemm, floats_at
from minimoe_numba.traced import traced
from minimoe_numpy import NumpyBackend

SCORES = 2**15  # per block, at most, unless LEAST tokens have more: 128 KiB
LEAST, MOST = 8, 64  # tokens per block
NEVER = np.int32(2**31 - 1)


@inlined
def tokens_of_block(heads, tk):  # type: ignore[no-untyped-def]
    return min(MOST, max(LEAST, SCORES // (heads * tk)))


@inlined
def bounds(position, causal, window):  # type: ignore[no-untyped-def]
    """Return the lowest and the highest key position that a query sees."""
    low = position - np.int32(window) + np.int32(1) if window else -NEVER
    if causal:
        return low, position
    return low, position + np.int32(window) - np.int32(1) if window else NEVER - np.int32(1)


@inlined
def keys_seen(positions, q_positions, causal, window):  # type: ignore[no-untyped-def]
    """Return a range of keys outside which no query of a block sees any.   -> first, last"""
    lowest, highest = q_positions[0], q_positions[0]
    for t in range(len(q_positions)):
        lowest, highest = min(lowest, q_positions[t]), max(highest, q_positions[t])
    low, _ = bounds(lowest, causal, window)
    _, high = bounds(highest, causal, window)
    first, last = 0, len(positions)
    while first < last and not low <= positions[first] <= high:
        first += 1
    while last > first and not low <= positions[last - 1] <= high:
        last -= 1
    return first, last


@inlined
def in_a_row(positions):  # type: ignore[no-untyped-def]
    """True if the keys have consecutive positions and all are valid: a query then sees a range of them, found without looking at each."""
    for j in range(len(positions)):
        if positions[j] != positions[0] + j:
            return False
    return len(positions) == 0 or positions[len(positions) - 1] != NEVER


@inlined
def seen_by(positions, row_of_keys, low, high):  # type: ignore[no-untyped-def]
    """Return a range of keys outside which a query sees none. If keys are in a row it sees the whole range.   -> first, last"""
    if not row_of_keys or not len(positions):
        return 0, len(positions)
    first = min(max(np.int64(low) - positions[0], 0), len(positions))
    return first, max(first, min(np.int64(high) - positions[0] + 1, len(positions)))


@inlined
def hide(scores, positions, low, high):  # type: ignore[no-untyped-def]
    """Set the scores of keys that a query does not see to -inf."""
    for j in range(len(scores)):
        seen = (positions[j] >= low) & (positions[j] <= high)
        scores[j] = scores[j] if seen else -INFINITY


@inlined
def clear(x):  # type: ignore[no-untyped-def]
    for i in range(len(x)):
        x[i] = ZERO


@inlined
def pack(x, row_stride, first, tokens, heads, width, scale, packed):  # type: ignore[no-untyped-def]
    """Scale and pack the rows (head, token) of a block.   x: address of its sequence and first head -> packed [heads*tokens,C]"""
    for s in range(heads):
        for t in range(tokens):
            row = floats_at(x + 4 * ((first + t) * row_stride + s * width), width)
            for d in range(width):
                packed[s * tokens + t, d] = row[d] * scale


@inlined
def unpack(packed, x, row_stride, first, tokens, heads, width, scales):  # type: ignore[no-untyped-def]
    """Write the packed rows back to x, each times its scale."""
    for s in range(heads):
        for t in range(tokens):
            row = floats_at(x + 4 * ((first + t) * row_stride + s * width), width)
            for d in range(width):
                row[d] = packed[s * tokens + t, d] * scales[s * tokens + t]


@compiled
def exp_row(scores, sink):  # type: ignore[no-untyped-def]
    """scores = exp(scores - their maximum).   -> one over their sum, logsumexp; 0 and -inf if nothing is seen"""
    top = max(largest(scores), sink)
    top = ZERO if top == -INFINITY else top
    total = ZERO
    for j in range(len(scores)):
        p = exp(scores[j] - top)
        scores[j] = p
        total += p
    total += exp(sink - top)
    if total == ZERO:
        return ZERO, -INFINITY
    return ONE / total, top + np.log(total)


@kernel
def attention_heads(
    start: int, stop: int, sgemm: int, inputs: L1, options: L1, scale: float, q_pos: I2, k_pos: I2, sinks: F1, y: F4, logsumexp: F3
) -> None:
    """Compute key/value heads start .. stop of all B*G.   inputs, options: from `grouped` -> y [B,Tq,Q,Cv], logsumexp [B,Q,Tq]"""
    q, k, v, q_row, k_row, v_row = inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], inputs[5]
    width, groups, causal, window = options[0], options[1], options[2], options[3]
    tq, queries, v_width = y.shape[1], y.shape[2], y.shape[3]
    tk, heads = k_pos.shape[1], queries // groups
    tokens = min(tq, tokens_of_block(heads, tk))
    packed = np.empty((heads * tokens, width), np.float32)
    scores = np.empty(heads * tokens * tk, np.float32)
    values, shares = np.empty((heads * tokens, v_width), np.float32), np.empty(heads * tokens, np.float32)
    for unit in range(start, stop):
        b, g = unit // groups, unit % groups
        positions = k_pos[b if k_pos.shape[0] > 1 else 0]
        row_of_keys = in_a_row(positions)
        q_positions = q_pos[b if q_pos.shape[0] > 1 else 0]
        q_here = q + 4 * (b * tq * q_row + g * heads * width)
        k_here, v_here = k + 4 * (b * tk * k_row + g * width), v + 4 * (b * tk * v_row + g * v_width)
        y_here = y.ctypes.data + 4 * (b * tq * queries + g * heads) * v_width
        for first in range(0, tq, tokens):
            count = min(tokens, tq - first)
            m = heads * count
            from_key, to_key = keys_seen(positions, q_positions[first : first + count], causal, window)
            keys = to_key - from_key
            here = positions[from_key:to_key]
            if keys:
                pack(q_here, q_row, first, count, heads, width, scale, packed)
                call_sgemm(
                    sgemm, PLAIN, TRANSPOSED, m, keys, width, packed.ctypes.data, width, k_here + 4 * from_key * k_row, k_row, ZERO,
                    scores.ctypes.data, keys,
                )  # fmt: skip
            for r in range(m):
                head, t = g * heads + r // count, first + r % count
                low, high = bounds(q_positions[t], causal, window)
                row = scores[r * keys : (r + 1) * keys]
                a, z = seen_by(here, row_of_keys, low, high)
                if not row_of_keys:
                    hide(row, here, low, high)
                shares[r], logsumexp[b, head, t] = exp_row(row[a:z], sinks[head] if sinks.size else -INFINITY)
                clear(row[:a])
                clear(row[z:])
            if keys:
                call_sgemm(
                    sgemm, PLAIN, PLAIN, m, v_width, keys, scores.ctypes.data, keys, v_here + 4 * from_key * v_row, v_row, ZERO,
                    values.ctypes.data, v_width,
                )  # fmt: skip
            else:
                values[:m] = ZERO
            unpack(values, y_here, queries * v_width, first, count, heads, v_width, shares)


@kernel
def attention_heads_backward(
    start: int, stop: int, sgemm: int, inputs: L1, options: L1, scale: float, q_pos: I2, k_pos: I2, dy: F4, y: F4, logsumexp: F3, delta: F3
) -> None:
    """Fill dq, dk, dv (addresses in `inputs`) and delta [B,Q,Tq] = sum(dy * y).   inputs, options: from `grouped`"""
    q, k, v, q_row, k_row, v_row = inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], inputs[5]
    dq, dk, dv = inputs[6], inputs[7], inputs[8]
    width, groups, causal, window = options[0], options[1], options[2], options[3]
    tq, queries, v_width = y.shape[1], y.shape[2], y.shape[3]
    tk, heads = k_pos.shape[1], queries // groups
    tokens = tokens_of_block(heads, tk)
    packed = np.empty((heads * tokens, width), np.float32)
    dy_packed = np.empty((heads * tokens, v_width), np.float32)
    p, dp = np.empty(heads * tokens * tk, np.float32), np.empty(heads * tokens * tk, np.float32)
    scales = np.empty(heads * tokens, np.float32)
    for r in range(len(scales)):
        scales[r] = scale
    for unit in range(start, stop):
        b, g = unit // groups, unit % groups
        positions = k_pos[b if k_pos.shape[0] > 1 else 0]
        row_of_keys = in_a_row(positions)
        q_positions = q_pos[b if q_pos.shape[0] > 1 else 0]
        q_here = q + 4 * (b * tq * q_row + g * heads * width)
        k_here, v_here = k + 4 * (b * tk * k_row + g * width), v + 4 * (b * tk * v_row + g * v_width)
        dk_row, dv_row = groups * width, groups * v_width
        dk_here, dv_here = dk + 4 * (b * tk * dk_row + g * width), dv + 4 * (b * tk * dv_row + g * v_width)
        dy_here = dy.ctypes.data + 4 * (b * tq * queries + g * heads) * v_width
        dq_here = dq + 4 * (b * tq * queries + g * heads) * width
        for j in range(tk):
            clear(floats_at(dk_here + 4 * j * dk_row, width))
            clear(floats_at(dv_here + 4 * j * dv_row, v_width))
        for first in range(0, tq, tokens):
            count = min(tokens, tq - first)
            m = heads * count
            from_key, to_key = keys_seen(positions, q_positions[first : first + count], causal, window)
            keys = to_key - from_key
            if not keys:
                for t in range(first, first + count):
                    clear(floats_at(dq_here + 4 * t * queries * width, heads * width))
                for head in range(g * heads, (g + 1) * heads):
                    clear(delta[b, head, first : first + count])
                continue
            here = positions[from_key:to_key]
            pack(q_here, q_row, first, count, heads, width, scale, packed)
            pack(dy_here, queries * v_width, first, count, heads, v_width, ONE, dy_packed)
            k_seen, v_seen = k_here + 4 * from_key * k_row, v_here + 4 * from_key * v_row
            call_sgemm(sgemm, PLAIN, TRANSPOSED, m, keys, width, packed.ctypes.data, width, k_seen, k_row, ZERO, p.ctypes.data, keys)
            call_sgemm(
                sgemm, PLAIN, TRANSPOSED, m, keys, v_width, dy_packed.ctypes.data, v_width, v_seen, v_row, ZERO, dp.ctypes.data, keys
            )
            for r in range(m):
                head, t = g * heads + r // count, first + r % count
                low, high = bounds(q_positions[t], causal, window)
                d = ZERO
                for c in range(v_width):
                    d += dy_packed[r, c] * y[b, t, head, c]
                delta[b, head, t] = d
                lse = logsumexp[b, head, t]
                p_row, dp_row = p[r * keys : (r + 1) * keys], dp[r * keys : (r + 1) * keys]
                a, z = seen_by(here, row_of_keys, low, high)
                if not row_of_keys:
                    hide(p_row, here, low, high)
                softmax_backward(p_row[a:z], dp_row[a:z], lse, d)
                for row in (p_row, dp_row):
                    clear(row[:a])
                    clear(row[z:])
            call_sgemm(
                sgemm, TRANSPOSED, PLAIN, keys, v_width, m, p.ctypes.data, keys, dy_packed.ctypes.data, v_width, ONE,
                dv_here + 4 * from_key * dv_row, dv_row,
            )  # fmt: skip
            call_sgemm(
                sgemm, TRANSPOSED, PLAIN, keys, width, m, dp.ctypes.data, keys, packed.ctypes.data, width, ONE,
                dk_here + 4 * from_key * dk_row, dk_row,
            )  # fmt: skip
            call_sgemm(sgemm, PLAIN, PLAIN, m, width, keys, dp.ctypes.data, keys, k_seen, k_row, ZERO, packed.ctypes.data, width)
            unpack(packed, dq_here, queries * width, first, count, heads, width, scales)


@compiled
def softmax_backward(p, dp, lse, delta):  # type: ignore[no-untyped-def]
    """Replace scores p by P = exp(p - lse), which is 0 for -inf, and dp by P (dp - delta)."""
    lse = ZERO if lse == -INFINITY else lse
    for j in range(len(p)):
        share = exp(p[j] - lse)
        p[j] = share
        dp[j] = share * (dp[j] - delta)


class FastAttention(NumpyBackend):
    def attention(
        self, q: Array, k: Array, v: Array, *, scale: float, causal: bool, window: int = 0, q_pos: Array, k_pos: Array,
        k_valid: Array | None = None, sinks: Array | None = None, dropout: float = 0.0, rng: Draw | None = None, out: Array | None = None,
    ) -> tuple[Array, Array]:  # fmt: skip
        blas = machine().blas
        if blas is None or dropout or not singles(q, k, v, sinks) or not (q.size and k.size and v.size):
            return super().attention(
                q, k, v, scale=scale, causal=causal, window=window, q_pos=q_pos, k_pos=k_pos, k_valid=k_valid, sinks=sinks, dropout=dropout,
                rng=rng, out=out,
            )  # fmt: skip
        (b, tq, queries, width), groups = q.shape, k.shape[2]
        y = empty((b, tq, queries, v.shape[3]))
        logsumexp = empty((b, queries, tq))
        rows = by_tokens(q), by_tokens(k), by_tokens(v)  # named, so that copies live until the kernel has run
        inputs, options = grouped(rows, (), (width, groups, causal, window))
        attention_heads(
            b * groups, 1, blas.sgemm, inputs, options, scale,
            *positions_of(q_pos, k_pos, k_valid), NO_FLOATS if sinks is None else contiguous(sinks), y, logsumexp,
        )  # fmt: skip
        return self.store(y, out), logsumexp

    def attention_backward(
        self, dy: Array, q: Array, k: Array, v: Array, y: Array, logsumexp: Array, *, scale: float, causal: bool, window: int = 0,
        q_pos: Array, k_pos: Array, k_valid: Array | None = None, sinks: Array | None = None, dropout: float = 0.0, rng: Draw | None = None,
    ) -> tuple[Array, Array, Array, Array | None]:  # fmt: skip
        blas = machine().blas
        if blas is None or dropout or not singles(dy, q, k, v, y, logsumexp, sinks) or not (q.size and k.size and v.size):
            return super().attention_backward(
                dy, q, k, v, y, logsumexp, scale=scale, causal=causal, window=window, q_pos=q_pos, k_pos=k_pos, k_valid=k_valid,
                sinks=sinks, dropout=dropout, rng=rng,
            )  # fmt: skip
        (b, tq, queries, width), groups = q.shape, k.shape[2]
        dq, dk, dv = (empty(a.shape) for a in (q, k, v))
        delta = empty((b, queries, tq))
        logsumexp = contiguous(logsumexp)
        rows = by_tokens(q), by_tokens(k), by_tokens(v)  # as above
        inputs, options = grouped(rows, (dq, dk, dv), (width, groups, causal, window))
        attention_heads_backward(
            b * groups, 1, blas.sgemm, inputs, options, scale,
            *positions_of(q_pos, k_pos, k_valid), contiguous(dy), contiguous(y), logsumexp, delta,
        )  # fmt: skip
        dsinks = None
        if sinks is not None:
            share = np.exp(sinks[:, None] - logsumexp)
            dsinks = -np.sum(share * delta, axis=(0, 2))
        return dq, dk, dv, dsinks


def by_tokens(x: Array) -> tuple[Array, int]:
    """Return x [B,T,heads,C] with the heads of a token side by side, copied if necessary, and the floats from one token to the next."""
    b, t, heads, width = x.shape
    row = x.strides[1] // 4
    fits = (b == 1 or x.strides[0] == t * row * 4) and x.strides[1:] == (row * 4, width * 4, 4)
    if not fits or row < heads * width:
        x, row = contiguous(x), heads * width
    return x, row


def grouped(rows: tuple[tuple[Array, int], ...], outputs: tuple[Array, ...], options: tuple[int, ...]) -> tuple[Array, Array]:
    """Return many arguments of a kernel as two arrays of int64.

    The first has the addresses of q, k and v, the floats from one token to the next in each, and the addresses of `outputs`. The second has
    `options`: head width, number of key/value heads, causal, window.
    """
    layout = [address(x) for x, _ in rows] + [step for _, step in rows] + [address(x) for x in outputs]
    return traced(np.array(layout, np.int64)), traced(np.array(options, np.int64))


def positions_of(q_pos: Array, k_pos: Array, k_valid: Array | None) -> tuple[Array, Array]:
    """Return positions as int32, with NEVER for a key that is not valid."""
    q_pos, k_pos = contiguous(q_pos, np.int32), contiguous(k_pos, np.int32)
    return q_pos, k_pos if k_valid is None else contiguous(np.where(k_valid, k_pos, NEVER), np.int32)
