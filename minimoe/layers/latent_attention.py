"""Multi-head latent attention: keys and values of all heads are computed from one narrow vector per token (DeepSeek-V2, 2024; DeepSeek-V3).

c = norm(W_kv x)[:rank],  [k_nope; v] = W_b c  for each head,  k = [k_nope; k_rope], k_rope = rope(W_kv x)[rank:] the same for all heads;
q = W_qb norm(W_qa x), or W_q x, = [q_nope; q_rope] per head, q_rope rotated.   y = softmax(scale q k^T) v,  scale = 1 / sqrt(nope + rope).
If YaRN stretches the positions, scale is multiplied by the square of `sharpening` (mscale_all_dim).
The cache keeps the keys and values of all heads, not c. That is simple, and takes more memory than c would.
"""

from typing import Any

from minimoe.backend import Array
from minimoe.config import LatentConfig
from minimoe.engine import ops
from minimoe.engine.tensor import Tensor
from minimoe.layers.attention import Attention
from minimoe.layers.dense import Linear, Norm
from minimoe.layers.rotary import sharpening


class LatentAttention(Attention):
    """Attention whose heads share a narrow vector: q, k and v differ from `Attention`, the rest is the same.   [B,T,D] -> [B,T,D]"""

    def __init__(self, d_model: int, n_heads: int, mla: LatentConfig, *, bias: bool, std: float, out_std: float, **options: Any) -> None:
        """`options`: causal, window, rope_theta, rope, max_seq_len, interleaved, dropout; `bias`: of q_a_proj, kv_a_proj and o_proj"""
        self.heads = self.groups = n_heads
        self.mla = mla
        self.width, self.v_width, self.rotated = mla.nope_dim + mla.rope_dim, mla.v_dim, mla.rope_dim
        self.causal, self.window, self.dropout = options["causal"], options["window"], options["dropout"]
        self.theta, self.rope, self.max_seq_len = options["rope_theta"], options["rope"], options["max_seq_len"]
        self.interleaved = options["interleaved"]
        self.sinks = None
        self.scale = self.width**-0.5
        if self.rope is not None and self.rope.mscale_all_dim:
            self.scale *= sharpening(self.rope.factor, self.rope.mscale_all_dim) ** 2
        if mla.q_rank:
            self.q_a_proj = Linear(d_model, mla.q_rank, bias, std)
            self.q_a_norm = Norm(mla.q_rank, "rms", mla.norm_eps)
        self.q_b_proj = Linear(mla.q_rank or d_model, n_heads * self.width, False, std)
        self.kv_a_proj = Linear(d_model, mla.kv_rank + mla.rope_dim, bias, std)
        self.kv_a_norm = Norm(mla.kv_rank, "rms", mla.norm_eps)
        self.kv_b_proj = Linear(mla.kv_rank, n_heads * (mla.nope_dim + mla.v_dim), False, std)
        self.o_proj = Linear(n_heads * mla.v_dim, d_model, bias, out_std)

    def _project(self, x: Tensor, b: int, t: int, positions: Array) -> tuple[Tensor, Tensor, Tensor]:
        """Return q and k [B,T,Q,nope+rope], v [B,T,Q,v_dim]."""
        mla, heads = self.mla, self.heads
        queries = self.q_a_norm(self.q_a_proj(x)) if mla.q_rank else x
        q = self.q_b_proj(queries).reshape(b, t, heads, self.width)
        q_nope, q_rope = ops.split(q, (mla.nope_dim, mla.rope_dim))
        narrow, k_rope = ops.split(self.kv_a_proj(x), (mla.kv_rank, mla.rope_dim))
        kv = self.kv_b_proj(self.kv_a_norm(narrow)).reshape(b, t, heads, mla.nope_dim + mla.v_dim)
        k_nope, v = ops.split(kv, (mla.nope_dim, mla.v_dim))
        k_rope = self._rotate(k_rope.reshape(b, t, 1, mla.rope_dim), positions)
        q = ops.concat([q_nope, self._rotate(q_rope, positions)], axis=-1)
        k = ops.concat([k_nope, ops.broadcast_to(k_rope, (b, t, heads, mla.rope_dim))], axis=-1)
        return q, k, v
