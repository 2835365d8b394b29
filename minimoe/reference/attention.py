"""Scaled dot-product attention with grouped heads (Vaswani et al. 2017; Ainslie et al. 2023), over positions rather than indices.

score[q, k] = scale * <q, k>, allowed where k is valid, k_pos <= q_pos if causal, and |q_pos - k_pos| < window if window > 0.
P = exp(score - logsumexp),   y = P V.   A row that allows nothing has output 0 and gradient 0.
sinks [Q] adds a score per head that takes weight but has no value (gpt-oss).

With delta = sum(dy * y):   dV = P^T dy,   dS = P * (dy V^T - delta),   dQ = scale dS K,   dK = scale dS^T Q,
dsink = -exp(sink - logsumexp) delta.
"""

from minimoe.reference.arrays import Array, ArrayLayer
from minimoe.reference.random import Draw, RandomKernels


class AttentionKernels(RandomKernels, ArrayLayer):
    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        scale: float,
        causal: bool,
        window: int = 0,
        q_pos: Array,
        k_pos: Array,
        k_valid: Array | None = None,
        sinks: Array | None = None,
        dropout: float = 0.0,
        rng: Draw | None = None,
        out: Array | None = None,
    ) -> tuple[Array, Array]:
        """q [B,Tq,Q,C], k [B,Tk,G,C], v [B,Tk,G,Cv], q_pos [B or 1,Tq], k_pos [B or 1,Tk] int32, k_valid [B or 1,Tk] bool, sinks [Q]
        -> y [B,Tq,Q,Cv], logsumexp [B,Q,Tq]. Query head i reads key/value head i // (Q/G). `dropout` acts on P, drawn by `rng`.
        """  # fmt: skip
        xp = self.xp
        scores = self._scores(q, k, scale, self._mask(causal, window, q_pos, k_pos, k_valid))  # [B,G,M,Tq,Tk]
        top = xp.max(scores, axis=-1, keepdims=True)
        if sinks is not None:
            sink = xp.reshape(self.wide(sinks), (1, k.shape[2], -1, 1, 1))
            top = xp.where(top > sink, top, sink)
        top = xp.where(xp.isinf(top), xp.zeros_like(top), top)
        scores -= top
        p = xp.exp(scores)
        total = xp.sum(p, axis=-1, keepdims=True)
        if sinks is not None:
            total = total + xp.exp(sink - top)
        empty = total == 0
        p /= xp.where(empty, xp.ones_like(total), total)
        logsumexp = xp.where(empty, xp.full_like(total, -xp.inf), top + xp.log(xp.where(empty, xp.ones_like(total), total)))
        if dropout:
            p *= self._keep(q, k, dropout, rng)
        y = xp.matmul(xp.astype(p, v.dtype, copy=False), self._values(v))  # [B,G,M,Tq,Cv]
        b, tq = q.shape[:2]
        y = self.contiguous(xp.reshape(xp.permute_dims(y, (0, 3, 1, 2, 4)), (b, tq, q.shape[2], v.shape[3])))
        return self.store(y, out), xp.reshape(logsumexp, (b, q.shape[2], tq))

    def attention_backward(
        self, dy: Array, q: Array, k: Array, v: Array, y: Array, logsumexp: Array, *, scale: float, causal: bool, window: int = 0,
        q_pos: Array, k_pos: Array, k_valid: Array | None = None, sinks: Array | None = None, dropout: float = 0.0, rng: Draw | None = None,
    ) -> tuple[Array, Array, Array, Array | None]:  # fmt: skip
        """-> dq, dk, dv as q, k, v; dsinks [Q] or None"""
        xp = self.xp
        b, tq, heads, _ = q.shape
        groups = k.shape[2]
        lse = xp.reshape(logsumexp, (b, groups, heads // groups, tq, 1))
        dead = xp.isinf(lse)
        p = self._scores(q, k, scale, self._mask(causal, window, q_pos, k_pos, k_valid))
        p -= xp.where(dead, xp.zeros_like(lse), lse)
        p = xp.exp(p)
        dy5 = self._queries(dy, groups)  # [B,G,M,Tq,Cv]
        dp = self.wide(xp.matmul(dy5, xp.matrix_transpose(self._values(v))))  # [B,G,M,Tq,Tk]
        delta = xp.sum(self.wide(dy) * self.wide(y), axis=-1)  # [B,Tq,Q]
        delta = xp.reshape(xp.permute_dims(delta, (0, 2, 1)), lse.shape)
        kept = p
        if dropout:
            keep = self._keep(q, k, dropout, rng)
            kept = p * keep
            dp *= keep
        dp -= delta
        dp *= p
        dsinks = None
        if sinks is not None:
            sink = xp.reshape(self.wide(sinks), (1, groups, -1, 1, 1))
            dsinks = xp.reshape(-xp.sum(xp.exp(sink - lse) * delta, axis=(0, 3, 4)), (heads,))
        ds = xp.astype(dp, q.dtype, copy=False)
        dq = xp.matmul(ds, self._values(k))
        dq *= scale
        dk = xp.sum(xp.matmul(xp.matrix_transpose(ds), self._queries(q, groups)), axis=2)  # [B,G,Tk,C]
        dk *= scale
        dv = xp.sum(xp.matmul(xp.matrix_transpose(xp.astype(kept, dy.dtype, copy=False)), dy5), axis=2)
        dq = xp.reshape(xp.permute_dims(dq, (0, 3, 1, 2, 4)), q.shape)
        dk, dv = (self.contiguous(xp.permute_dims(grad, (0, 2, 1, 3))) for grad in (dk, dv))
        return self.contiguous(dq), dk, dv, dsinks

    # ---- parts ---------------------------------------------------------------------------------------------------------------

    def _queries(self, q: Array, groups: int) -> Array:
        """[B,T,Q,C] -> [B,G,M,T,C], M = Q/G query heads for each key/value head"""
        b, t, heads, c = q.shape
        return self.xp.permute_dims(self.xp.reshape(q, (b, t, groups, heads // groups, c)), (0, 2, 3, 1, 4))

    def _values(self, v: Array) -> Array:
        """[B,T,G,C] -> [B,G,1,T,C]"""
        return self.xp.permute_dims(v, (0, 2, 1, 3))[:, :, None, :, :]

    def _scores(self, q: Array, k: Array, scale: float, mask: Array | None) -> Array:
        """scale * q k^T, -inf where not allowed.   -> [B,G,M,Tq,Tk]"""
        q5 = self._queries(q * scale, k.shape[2])
        scores = self.wide(self.xp.matmul(q5, self.xp.matrix_transpose(self._values(k))))
        if mask is not None:
            scores += self.xp.astype(mask, scores.dtype, copy=False)
        return scores

    def _mask(self, causal: bool, window: int, q_pos: Array, k_pos: Array, k_valid: Array | None) -> Array | None:
        """0 where allowed, -inf elsewhere.   -> [B or 1,1,1,Tq,Tk] or None"""
        xp = self.xp
        if not causal and not window and k_valid is None:
            return None
        distance = q_pos[:, :, None] - k_pos[:, None, :]
        allowed = distance >= 0 if causal else xp.ones_like(distance, dtype=xp.bool)
        if window:
            allowed = allowed & (xp.abs(distance) < window)
        if k_valid is not None:
            allowed = allowed & k_valid[:, None, :]
        zeros = xp.zeros_like(allowed, dtype=xp.float32)
        return xp.where(allowed, zeros, zeros - xp.inf)[:, None, None, :, :]

    def _keep(self, q: Array, k: Array, dropout: float, rng: Draw | None) -> Array:
        """The dropout mask over P, scaled by 1 / (1 - dropout).   -> [B,G,M,Tq,Tk]"""
        if rng is None:
            raise ValueError("attention: dropout > 0 needs rng")
        b, tq, heads, _ = q.shape
        keep = self.dropout_mask(b * heads * tq * k.shape[1], dropout, rng, self.wide(q).dtype)
        return self.xp.reshape(keep, (b, k.shape[2], heads // k.shape[2], tq, k.shape[1]))
