"""Rotary positions, one pair of coordinates after the other, and the heads of one projection."""

import numpy as np

from toy_backend.parts import Array, Scratch, put


class Rotations(Scratch):
    def rope(
        self, x: Array, positions: Array, inv_freq: Array, scale: float = 1.0, interleaved: bool = False, out: Array | None = None
    ) -> Array:
        return put(rotated(x, positions, inv_freq, scale, interleaved), out)

    def rope_backward(self, dy: Array, positions: Array, inv_freq: Array, scale: float = 1.0, interleaved: bool = False) -> Array:
        return rotated(dy, positions, -inv_freq, scale, interleaved)

    def split_heads(self, qkv: Array, positions: Array, inv_freq: Array | None, *, heads: int, groups: int) -> tuple[Array, Array, Array]:
        b, t, width = qkv.shape
        c = width // (heads + 2 * groups)
        each = qkv.reshape(b, t, heads + 2 * groups, c)
        q, k, v = each[:, :, :heads], each[:, :, heads : heads + groups], each[:, :, heads + groups :]
        if inv_freq is not None:
            q, k = rotated(q, positions, inv_freq), rotated(k, positions, inv_freq)
        return q, k, v

    def split_heads_backward(self, dq: Array, dk: Array, dv: Array, positions: Array, inv_freq: Array | None) -> Array:
        b, t, heads, c = dq.shape
        groups = dk.shape[2]
        dqkv = np.empty((b, t, heads + 2 * groups, c), dtype=dq.dtype)
        if inv_freq is not None:
            dq, dk = rotated(dq, positions, -inv_freq), rotated(dk, positions, -inv_freq)
        dqkv[:, :, :heads] = dq
        dqkv[:, :, heads : heads + groups] = dk
        dqkv[:, :, heads + groups :] = dv
        return dqkv.reshape(b, t, (heads + 2 * groups) * c)


def rotated(x: Array, positions: Array, inv_freq: Array, scale: float = 1.0, interleaved: bool = False) -> Array:
    """x [B,T,heads,C], positions [B or 1,T], inv_freq [pairs] -> [B,T,heads,C]; a negative inv_freq turns back"""
    pairs = len(inv_freq)
    y = x.copy()
    for i in range(pairs):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
        angle = (positions * inv_freq[i])[:, :, None]  # [B,T,1], float64
        cos, sin = scale * np.cos(angle), scale * np.sin(angle)
        a, b = x[..., first], x[..., second]  # [B,T,heads]
        y[..., first] = a * cos - b * sin
        y[..., second] = a * sin + b * cos
    return y
