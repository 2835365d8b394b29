"""Attention with grouped heads (Ainslie et al. 2023)."""

from __future__ import annotations

import math

import numpy as np

from minimoe.backend import Array, Backend
from minimoe.config import RopeConfig
from minimoe.engine import ops
from minimoe.engine.random import Rng
from minimoe.engine.tensor import Tensor
from minimoe.errors import ConfigError
from minimoe.layers.cache import CachingLayer, KeyValueCache
from minimoe.layers.dense import Linear, Norm
from minimoe.layers.module import Parameter, cast_like_or_none
from minimoe.layers.rotary import frequencies


class Attention(CachingLayer):
    """Attention with grouped heads: one product computes q, k and v, another joins the heads.   [B,T,D] -> [B,T,D]

    With a cache, keys and values of earlier calls are constants: no gradient flows back through them.
    """

    def __init__(
        self, d_model: int, n_heads: int, n_kv_heads: int | None = None, head_dim: int | None = None, *, causal: bool = True,
        window: int = 0, position: str = "rope", rope_theta: float = 10000.0, rope: RopeConfig | None = None, max_seq_len: int = 0,
        qk_norm: str = "none", norm_eps: float = 1e-5, bias: bool = False, sinks: bool = False, dropout: float = 0.0, std: float = 0.02,
        out_std: float | None = None,
    ) -> None:  # fmt: skip
        """`sinks`: a learned score per head that takes weight and has no value. `rope`, `max_seq_len`: as in rotary.py."""
        self.heads, self.groups = n_heads, n_kv_heads or n_heads
        self.width = self.v_width = head_dim or d_model // n_heads
        self.scale = 1.0 / math.sqrt(self.width)
        if self.heads % self.groups:
            raise ConfigError(f"attention: n_heads ({self.heads}) must be a multiple of n_kv_heads ({self.groups})")
        self.causal, self.window, self.dropout = causal, window, dropout
        self.theta, self.rope, self.max_seq_len = rope_theta if position == "rope" else 0.0, rope, max_seq_len
        self.rotated, self.interleaved = self.width, False
        self.sinks = Parameter(n_heads, role="vector") if sinks else None
        self.qkv_proj = Linear(d_model, (self.heads + 2 * self.groups) * self.width, bias, std)
        self.o_proj = Linear(self.heads * self.width, d_model, bias, std if out_std is None else out_std)
        self.norm_over = qk_norm
        if qk_norm != "none":
            each = qk_norm == "head"
            self.q_norm = Norm(self.width if each else self.heads * self.width, "rms", norm_eps)
            self.k_norm = Norm(self.width if each else self.groups * self.width, "rms", norm_eps)

    def setup(self, backend: Backend, dtype: str) -> None:
        self.backend, self.dtype = backend, backend.dtype(dtype)
        if self.theta:
            angles, self.rope_scale = frequencies(self.theta, self.rotated, self.rope, self.max_seq_len)
            self.inv_freq = backend.from_host(angles.astype(np.float64 if dtype == "float64" else np.float32))

    def __call__(
        self, x: Tensor, positions: Array, valid: Array | None = None, rng: Rng | None = None, cache: KeyValueCache | None = None,
        places: Array | None = None,
    ) -> Tensor:  # fmt: skip
        """x [B,T,D], positions [B or 1,T] int32, valid [B,T] bool: keys that count (with a cache, the cache knows them)

        places [B,T] int32 are compared in place of positions, in a window of at most T: see `document_places`.
        """
        b, t, _ = x.shape
        q, k, v = self._project(x, b, t, positions)
        q_positions = k_positions = positions if places is None else places
        window = self.window if places is None else min(self.window or t, t)
        if cache is not None:
            k_seen, v_seen, k_positions, valid = cache.append(k.data, v.data)
            k, v = Tensor(k_seen, x.backend), Tensor(v_seen, x.backend)
        dropout = self.dropout if rng is not None else 0.0
        y = ops.attention(
            q, k, v, cast_like_or_none(self.sinks, q), scale=self.scale, causal=self.causal, window=window, q_pos=q_positions,
            k_pos=k_positions, k_valid=valid, dropout=dropout,
            rng=rng.draw(self.path, "attention_dropout") if rng is not None and dropout else None,
        )  # fmt: skip
        return self.o_proj(y.reshape(b, t, self.heads * self.v_width))

    def _project(self, x: Tensor, b: int, t: int, positions: Array) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [B,T,Q,C], k and v [B,T,G,C]; q and k are normalised if the model does so, then rotated."""
        inv_freq = self.inv_freq if self.theta else None
        if self.norm_over == "none" and (inv_freq is None or self.rope_scale == 1.0):
            return ops.split_heads(self.qkv_proj(x), positions, inv_freq, self.heads, self.groups)
        rows, groups, c = self.heads * self.width, self.groups * self.width, self.width
        q, k, v = ops.split(self.qkv_proj(x), (rows, groups, groups))
        if self.norm_over == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.reshape(b, t, self.heads, c), k.reshape(b, t, self.groups, c), v.reshape(b, t, self.groups, c)
        if self.norm_over == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if inv_freq is not None:
            q, k = self._rotate(q, positions), self._rotate(k, positions)
        return q, k, v

    def make_cache(self, batch: int, capacity: int) -> KeyValueCache:
        """Return buffers for `capacity` columns, or for a window's columns if these are fewer."""
        rolls = self.causal and 0 < self.window <= capacity
        slots = self.window if rolls else capacity
        return KeyValueCache(batch, slots, self.groups, (self.width, self.v_width), self.dtype, self.backend, rolls)

    def _rotate(self, x: Tensor, positions: Array) -> Tensor:
        """Apply rotary positions to the first coordinates of each head.   x [B,T,heads,C]"""
        return ops.rope(x, positions, self.inv_freq, self.rope_scale, self.interleaved)


def document_places(indices: Array, starts: Array) -> Array:
    """Return positions for attention that keep it within documents: those of two documents lie more than T apart, a window's width.

    indices [1,T]: 0 .. T-1; starts [B,T]: the index at which the document of each position begins -> [B,T] int32, up to T (T + 1)
    """
    return indices + starts * indices.shape[1]
