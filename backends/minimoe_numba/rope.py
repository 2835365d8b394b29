"""Rotary positions in one pass, the heads read where they lie in the qkv projection. Formulas: minimoe/reference/rope.py."""

import numpy as np
from numba import carray

from minimoe.backend import Array
from minimoe_numba.arrays import by_width, result, singles
from minimoe_numba.compiling import compiled
from minimoe_numba.kernel import F2, F3, address, kernel
from minimoe_numba.native import pointer
from minimoe_numpy import NumpyBackend

BYTES = 4  # of a float32


@compiled
def turn_halves(x, p, cos, sin, y):  # type: ignore[no-untyped-def]
    """x [heads,C], by row p of the tables -> y"""
    pairs = cos.shape[1]
    for h in range(len(x)):
        for i in range(pairs):
            a, b, c, s = x[h, i], x[h, pairs + i], cos[p, i], sin[p, i]
            y[h, i] = a * c - b * s
            y[h, pairs + i] = b * c + a * s


@compiled
def turn_neighbours(x, p, cos, sin, y):  # type: ignore[no-untyped-def]
    """x [heads,C], by row p of the tables -> y"""
    for h in range(len(x)):
        for i in range(cos.shape[1]):
            a, b, c, s = x[h, 2 * i], x[h, 2 * i + 1], cos[p, i], sin[p, i]
            y[h, 2 * i] = a * c - b * s
            y[h, 2 * i + 1] = b * c + a * s


@kernel
def turn_tokens(
    start: int, stop: int, source: int, step_b: int, step_t: int, length: int, cos: F2, sin: F2, interleaved: int, y: F3
) -> None:
    """x lies at the address `source`, its steps in bytes along B and T (of `length`); cos, sin [T or B*T,pairs]; y [B*T,heads,C]."""
    heads, width = y.shape[1:]
    for n in range(start, stop):
        b = n // length
        t = n - b * length
        p = n if len(cos) > length else t
        x = carray(pointer(source + b * step_b + t * step_t, np.float32), (heads, width))
        if interleaved:
            turn_neighbours(x, p, cos, sin, y[n])
        else:
            turn_halves(x, p, cos, sin, y[n])
        if 2 * cos.shape[1] < width:
            y[n, :, 2 * cos.shape[1] :] = x[:, 2 * cos.shape[1] :]


def rotate(x: Array, positions: Array, inv_freq: Array, scale: float, interleaved: bool, turn: float, y: Array) -> None:
    """x [B,T,heads,C], turned forward (1.0) or back (-1.0), into y"""
    b, t, heads, width = x.shape
    pairs = len(inv_freq)
    angle = positions.astype(inv_freq.dtype)[:, :, None] * inv_freq  # [B or 1,T,pairs]
    cos, sin = np.cos(angle) * scale, np.sin(angle) * (scale * turn)
    cos, sin = (table.astype(np.float32, copy=False).reshape(-1, pairs) for table in (cos, sin))
    if x.strides[2:] != (BYTES * width, BYTES):
        x = np.ascontiguousarray(x)
    turn_tokens(b * t, by_width(heads * width), address(x), *x.strides[:2], t, cos, sin, interleaved, y.reshape(b * t, heads, width))


def fits(x: Array, positions: Array, inv_freq: Array) -> bool:
    """What does not fit is for the reference, which says what is wrong."""
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
        dx = np.empty(dy.shape, np.float32)
        rotate(dy, positions, inv_freq, scale, interleaved, -1.0, dx)
        return dx
