"""Rotary positions: each pair of a head's coordinates is rotated by an angle that grows with the position (Su et al. 2021).

angle[t, i] = positions[t] * inv_freq[i];   (a, b) -> (a cos - b sin, b cos + a sin) * scale.
Pairs are (i, i + C/2), the convention of Llama and Mixtral, or, interleaved, (2i, 2i + 1). Coordinates past 2 * len(inv_freq) pass through
unchanged. The gradient is rotated the other way.

`split_heads` cuts the rows of one projection into the heads of queries, keys and values, and rotates the first two.
"""

from minimoe.reference.arrays import Array, ArrayLayer


class RopeKernels(ArrayLayer):
    def rope(
        self, x: Array, positions: Array, inv_freq: Array, scale: float = 1.0, interleaved: bool = False, out: Array | None = None
    ) -> Array:
        """x [B,T,heads,C], positions [B or 1,T] int32, inv_freq [<= C/2] float -> [B,T,heads,C]"""
        return self.store(self._rotate(x, positions, inv_freq, scale, interleaved, 1.0), out)

    def rope_backward(self, dy: Array, positions: Array, inv_freq: Array, scale: float = 1.0, interleaved: bool = False) -> Array:
        """-> dx [B,T,heads,C]"""
        return self._rotate(dy, positions, inv_freq, scale, interleaved, -1.0)

    def split_heads(self, qkv: Array, positions: Array, inv_freq: Array | None, *, heads: int, groups: int) -> tuple[Array, Array, Array]:
        """qkv [B,T,(Q+2G)*C], positions as rope's, inv_freq None: no rotation -> q [B,T,Q,C], k, v [B,T,G,C], which may be views of qkv"""
        b, t, width = qkv.shape
        c = width // (heads + 2 * groups)
        ends = (0, heads * c, (heads + groups) * c, width)
        q, k, v = (self.xp.reshape(qkv[..., i:j], (b, t, (j - i) // c, c)) for i, j in zip(ends, ends[1:], strict=False))
        if inv_freq is not None:
            q, k = self.rope(q, positions, inv_freq), self.rope(k, positions, inv_freq)
        return q, k, v

    def split_heads_backward(self, dq: Array, dk: Array, dv: Array, positions: Array, inv_freq: Array | None) -> Array:
        """-> dqkv [B,T,(Q+2G)*C]"""
        b, t = dq.shape[:2]
        if inv_freq is not None:
            dq, dk = self.rope_backward(dq, positions, inv_freq), self.rope_backward(dk, positions, inv_freq)
        return self.xp.concat([self.xp.reshape(d, (b, t, d.shape[2] * d.shape[3])) for d in (dq, dk, dv)], axis=-1)

    def _rotate(self, x: Array, positions: Array, inv_freq: Array, scale: float, interleaved: bool, turn: float) -> Array:
        xp = self.xp
        pairs = inv_freq.shape[0]
        angle = xp.astype(positions, inv_freq.dtype)[:, :, None, None] * inv_freq  # [B,T,1,pairs]
        cos = xp.astype(xp.cos(angle) * scale, x.dtype, copy=False)
        sin = xp.astype(xp.sin(angle) * (scale * turn), x.dtype, copy=False)
        first = (..., slice(0, 2 * pairs, 2)) if interleaved else (..., slice(0, pairs))
        second = (..., slice(1, 2 * pairs, 2)) if interleaved else (..., slice(pairs, 2 * pairs))
        a, b = x[first], x[second]
        y = xp.empty_like(x) if 2 * pairs == x.shape[-1] else xp.asarray(x, copy=True)
        y[first] = a * cos - b * sin
        y[second] = b * cos + a * sin
        return y
