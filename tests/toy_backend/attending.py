"""Attention, one head of one sequence at a time: [Tq,Tk] scores in scratch memory, which the next head overwrites."""

import numpy as np

from minimoe.reference.random import Draw
from toy_backend.parts import Array, Scratch


class Attending(Scratch):
    def attention(
        self, q: Array, k: Array, v: Array, *, scale: float, causal: bool, window: int = 0, q_pos: Array, k_pos: Array,
        k_valid: Array | None = None, sinks: Array | None = None, dropout: float = 0.0, rng: Draw | None = None, out: Array | None = None,
    ) -> tuple[Array, Array]:  # fmt: skip
        batch, tq, heads, _ = q.shape
        per_group = heads // k.shape[2]
        y = np.empty((batch, tq, heads, v.shape[3]), dtype=q.dtype) if out is None else out
        logsumexp = np.empty((batch, heads, tq), dtype=q.dtype)
        keep = self._kept(q, k, dropout, rng)
        for b in range(batch):
            allowed = allowed_pairs(b, causal, window, q_pos, k_pos, k_valid)  # [Tq,Tk]
            for head in range(heads):
                group = head // per_group
                scores = self._scores(q[b, :, head], k[b, :, group], scale, allowed)
                top = scores.max(axis=1)  # [Tq]
                if sinks is not None:
                    top = np.maximum(top, sinks[head])
                top[top == -np.inf] = 0.0  # a row without a key
                scores -= top[:, None]
                np.exp(scores, out=scores)
                total = scores.sum(axis=1)  # [Tq]
                if sinks is not None:
                    total += np.exp(sinks[head] - top)
                logsumexp[b, head] = top + np.log(total)  # -inf in a row without a key
                scores /= np.where(total == 0.0, 1.0, total)[:, None]
                if keep is not None:
                    scores *= keep[b, head]
                y[b, :, head] = scores @ v[b, :, group]
        return y, logsumexp

    def attention_backward(
        self, dy: Array, q: Array, k: Array, v: Array, y: Array, logsumexp: Array, *, scale: float, causal: bool, window: int = 0,
        q_pos: Array, k_pos: Array, k_valid: Array | None = None, sinks: Array | None = None, dropout: float = 0.0, rng: Draw | None = None,
    ) -> tuple[Array, Array, Array, Array | None]:  # fmt: skip
        batch, _, heads, _ = q.shape
        per_group = heads // k.shape[2]
        dq, dk, dv = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
        dsinks = None if sinks is None else np.zeros_like(sinks)
        keep = self._kept(q, k, dropout, rng)
        for b in range(batch):
            allowed = allowed_pairs(b, causal, window, q_pos, k_pos, k_valid)
            for head in range(heads):
                group = head // per_group
                lse = logsumexp[b, head].copy()  # [Tq]
                lse[lse == -np.inf] = 0.0  # a row without a key: its scores are -inf, and exp(-inf) is 0
                p = self._scores(q[b, :, head], k[b, :, group], scale, allowed)
                p -= lse[:, None]
                np.exp(p, out=p)
                dy_head = dy[b, :, head]  # [Tq,Cv]
                dp = dy_head @ v[b, :, group].T  # [Tq,Tk]
                delta = np.sum(dy_head * y[b, :, head], axis=1)  # [Tq]
                if keep is None:
                    dv[b, :, group] += p.T @ dy_head
                else:
                    dv[b, :, group] += (p * keep[b, head]).T @ dy_head
                    dp *= keep[b, head]
                dp -= delta[:, None]
                dp *= p
                dp *= scale
                dq[b, :, head] = dp @ k[b, :, group]
                dk[b, :, group] += dp.T @ q[b, :, head]
                if dsinks is not None and sinks is not None:
                    dsinks[head] -= np.sum(np.exp(sinks[head] - lse) * delta)
        return dq, dk, dv, dsinks

    def _scores(self, q: Array, k: Array, scale: float, allowed: Array) -> Array:
        """scale q k^T in scratch memory, -inf where it is not allowed.   q [Tq,C], k [Tk,C] -> [Tq,Tk]"""
        scores = self._scratch("scores", allowed.shape, q.dtype)
        np.matmul(q, k.T, out=scores)
        scores *= scale
        scores[~allowed] = -np.inf
        return scores

    def _kept(self, q: Array, k: Array, dropout: float, rng: Draw | None) -> Array | None:
        """0 or 1 / (1 - dropout) for each probability, None without dropout.   -> [B,Q,Tq,Tk]"""
        if dropout == 0.0:
            return None
        if rng is None:
            raise ValueError("attention: dropout > 0 needs rng")
        shape = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
        u = self.uniform(int(np.prod(shape)), rng).reshape(shape)
        return np.where(u < dropout, 0.0, 1.0 / (1.0 - dropout)).astype(q.dtype)


def allowed_pairs(b: int, causal: bool, window: int, q_pos: Array, k_pos: Array, k_valid: Array | None) -> Array:
    """True where query and key of sequence b may meet; positions and `k_valid` may have one row for all.   -> [Tq,Tk]"""
    ahead = q_pos[min(b, len(q_pos) - 1)][:, None] - k_pos[min(b, len(k_pos) - 1)][None, :]  # by how much the query is later
    allowed = np.ones(ahead.shape, dtype=np.bool_)
    if causal:
        allowed &= ahead >= 0
    if window > 0:
        allowed &= (ahead < window) & (ahead > -window)
    if k_valid is not None:
        allowed &= k_valid[min(b, len(k_valid) - 1)][None, :]
    return allowed
