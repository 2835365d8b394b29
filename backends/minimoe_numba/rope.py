"""Rotary positions in one pass, which reads the heads where they are in the qkv projection. Formulas: minimoe/reference/rope.py."""

from functools import lru_cache
from typing import Any

import numpy as np
from numba import carray

from minimoe.backend import Array
from minimoe_numba.arrays import by_width, result, singles
from minimoe_numba.compiling import inlined
from minimoe_numba.creation import contiguous, empty
from minimoe_numba.kernel import F2, F3, address, kernel
from minimoe_numba.native import pointer
from minimoe_numba.traced import recorder
from minimoe_numpy import NumpyBackend

BYTES = 4  # of a float32


@inlined
def turn_halves(x, p, cos, sin, y):  # type: ignore[no-untyped-def]
    """Rotate the pairs (i, pairs + i) of x [heads,C] by row p of the tables, into y."""
    pairs = cos.shape[1]
    for h in range(len(x)):
        for i in range(pairs):
            a, b, c, s = x[h, i], x[h, pairs + i], cos[p, i], sin[p, i]
            y[h, i] = a * c - b * s
            y[h, pairs + i] = b * c + a * s


@inlined
def turn_neighbours(x, p, cos, sin, y):  # type: ignore[no-untyped-def]
    """Rotate the pairs (2i, 2i + 1) of x [heads,C] by row p of the tables, into y."""
    for h in range(len(x)):
        for i in range(cos.shape[1]):
            a, b, c, s = x[h, 2 * i], x[h, 2 * i + 1], cos[p, i], sin[p, i]
            y[h, 2 * i] = a * c - b * s
            y[h, 2 * i + 1] = b * c + a * s


@inlined
def copy_row(x, y):  # type: ignore[no-untyped-def]
    for d in range(len(x)):
        y[d] = x[d]


@inlined
def turn_row(x, p, cos, sin, interleaved, y):  # type: ignore[no-untyped-def]
    """Rotate x [heads,C] by row p of the tables, into y. Coordinates past the pairs are copied."""
    turned = 2 * cos.shape[1]
    if interleaved:
        turn_neighbours(x, p, cos, sin, y)
    else:
        turn_halves(x, p, cos, sin, y)
    if turned < x.shape[1]:
        for h in range(len(x)):
            copy_row(x[h, turned:], y[h, turned:])


@kernel
def turn_tokens(
    start: int, stop: int, source: int, step_b: int, step_t: int, length: int, cos: F2, sin: F2, interleaved: int, y: F3
) -> None:
    """Rotate x [B,T,heads,C], at the address `source`, into y [B*T,heads,C].

    step_b, step_t: the strides of x in bytes; length: T; cos, sin [T or B*T,pairs].
    """
    heads, width = y.shape[1:]
    for n in range(start, stop):
        b = n // length
        t = n - b * length
        x = carray(pointer(source + b * step_b + t * step_t, np.float32), (heads, width))
        turn_row(x, n if len(cos) > length else t, cos, sin, interleaved, y[n])


@kernel
def split_tokens(start: int, stop: int, qkv: F3, length: int, cos: F2, sin: F2, q: F3, k: F3) -> None:
    """Rotate queries and keys of qkv [B*T,Q+2G,C] into q [B*T,Q,C] and k [B*T,G,C]."""
    heads, groups = q.shape[1], k.shape[1]
    for n in range(start, stop):
        p = n if len(cos) > length else n % length
        turn_row(qkv[n, :heads], p, cos, sin, False, q[n])
        turn_row(qkv[n, heads : heads + groups], p, cos, sin, False, k[n])


@kernel
def join_tokens(start: int, stop: int, dq: F3, dk: F3, dv: F3, length: int, cos: F2, sin: F2, dqkv: F3) -> None:
    """Rotate dq and dk back, and write them and dv into dqkv [B*T,Q+2G,C]."""
    heads, groups = dq.shape[1], dk.shape[1]
    for n in range(start, stop):
        p = n if len(cos) > length else n % length
        turn_row(dq[n], p, cos, sin, False, dqkv[n, :heads])
        turn_row(dk[n], p, cos, sin, False, dqkv[n, heads : heads + groups])
        for h in range(groups):
            copy_row(dv[n, h], dqkv[n, heads + groups + h])


@kernel
def join_rows(start: int, stop: int, dq: F2, dk: F2, dv: F2, dqkv: F2) -> None:
    """Write dq, dk and dv side by side into dqkv, without rotation."""
    q, k = dq.shape[1], dk.shape[1]
    for n in range(start, stop):
        copy_row(dq[n], dqkv[n, :q])
        copy_row(dk[n], dqkv[n, q : q + k])
        copy_row(dv[n], dqkv[n, q + k :])


def tables(positions: Array, inv_freq: Array, scale: float, turn: float) -> tuple[Array, Array]:
    """Return the cos and sin of each angle.   -> [T or B*T,pairs] each"""
    tape = recorder.tape
    if tape is None:
        return tables_of(positions.tobytes(), positions.dtype, inv_freq.tobytes(), inv_freq.dtype, scale, turn)
    key = "cos and sin", address(positions), positions.shape, positions.strides, address(inv_freq), inv_freq.shape, scale, turn
    if key not in tape.shared:
        tape.shared[key] = positions, inv_freq, cos_and_sin(positions, inv_freq, scale, turn)  # held, so that the addresses stay theirs
    cos_sin: tuple[Array, Array] = tape.shared[key][2]
    return cos_sin


@lru_cache(maxsize=16)
def tables_of(positions: bytes, int_type: Any, inv_freq: bytes, float_type: Any, scale: float, turn: float) -> tuple[Array, Array]:
    """Cache tables by the contents of the arrays: every layer of a model rotates by the same angles, forward and back."""
    return cos_and_sin(np.frombuffer(positions, int_type), np.frombuffer(inv_freq, float_type), scale, turn)


def cos_and_sin(positions: Array, inv_freq: Array, scale: float, turn: float) -> tuple[Array, Array]:
    angle = positions.reshape(-1).astype(inv_freq.dtype)[:, None] * inv_freq
    cos, sin = np.cos(angle) * scale, np.sin(angle) * (scale * turn)
    return cos.astype(np.float32, copy=False), sin.astype(np.float32, copy=False)


def rotate(x: Array, positions: Array, inv_freq: Array, scale: float, interleaved: bool, turn: float, y: Array) -> None:
    """Rotate x [B,T,heads,C] into y, forward if `turn` is 1.0, back if it is -1.0."""
    b, t, heads, width = x.shape
    if x.strides[2:] != (BYTES * width, BYTES):
        x = contiguous(x)
    turned = y.reshape(b * t, heads, width)
    turn_tokens(
        b * t, by_width(heads * width), address(x), *x.strides[:2], t, *tables(positions, inv_freq, scale, turn), interleaved, turned
    )


def fits(x: Array, positions: Array, inv_freq: Array) -> bool:
    """True if the kernel can take these. Others go to the reference, which says what is wrong."""
    return singles(x) and x.ndim == 4 and positions.shape in ((1, x.shape[1]), x.shape[:2]) and 2 * len(inv_freq) <= x.shape[3]


class FastRope(NumpyBackend):
    def rope(
        self, x: Array, positions: Array, inv_freq: Array, scale: float = 1.0, interleaved: bool = False, out: Array | None = None
    ) -> Array:
        if not fits(x, positions, inv_freq):
            return super().rope(x, positions, inv_freq, scale, interleaved, out)
        y = result(out, x.shape)
        rotate(x, positions, inv_freq, scale, interleaved, 1.0, y)
        return y if y is out else self.store(y, out)

    def rope_backward(self, dy: Array, positions: Array, inv_freq: Array, scale: float = 1.0, interleaved: bool = False) -> Array:
        if not fits(dy, positions, inv_freq):
            return super().rope_backward(dy, positions, inv_freq, scale, interleaved)
        dx = empty(dy.shape)
        rotate(dy, positions, inv_freq, scale, interleaved, -1.0, dx)
        return dx

    def split_heads(self, qkv: Array, positions: Array, inv_freq: Array | None, *, heads: int, groups: int) -> tuple[Array, Array, Array]:
        if inv_freq is None or not singles(qkv) or not qkv.size:
            return super().split_heads(qkv, positions, inv_freq, heads=heads, groups=groups)
        b, t, width = qkv.shape
        c = width // (heads + 2 * groups)
        whole = contiguous(qkv).reshape(b * t, heads + 2 * groups, c)
        q, k = empty((b, t, heads, c)), empty((b, t, groups, c))
        cos_sin = tables(positions, inv_freq, 1.0, 1.0)
        split_tokens(b * t, by_width(width), whole, t, *cos_sin, q.reshape(b * t, heads, c), k.reshape(b * t, groups, c))
        return q, k, whole[:, heads + groups :].reshape(b, t, groups, c)

    def split_heads_backward(self, dq: Array, dk: Array, dv: Array, positions: Array, inv_freq: Array | None) -> Array:
        if not singles(dq, dk, dv) or not dq.size:
            return super().split_heads_backward(dq, dk, dv, positions, inv_freq)
        (b, t, heads, c), groups = dq.shape, dk.shape[2]
        dqkv = empty((b, t, (heads + 2 * groups) * c))
        parts, grain = [contiguous(d).reshape(b * t, -1) for d in (dq, dk, dv)], by_width(dqkv.shape[2])
        if inv_freq is None:
            join_rows(b * t, grain, *parts, dqkv.reshape(b * t, -1))
        else:
            dq, dk, dv, whole = (d.reshape(b * t, -1, c) for d in (*parts, dqkv))
            join_tokens(b * t, grain, dq, dk, dv, t, *tables(positions, inv_freq, 1.0, -1.0), whole)
        return dqkv
