"""One block of a Transformer: attention, then a feed-forward layer, around the residual stream."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from minimoe.backend import Array
from minimoe.config import ModelConfig
from minimoe.engine.random import Rng
from minimoe.engine.recompute import recompute
from minimoe.engine.tensor import Tensor
from minimoe.layers.attention import Attention
from minimoe.layers.balance import MoEStats
from minimoe.layers.cache import Cache
from minimoe.layers.dense import Dropout, FeedForward, Norm
from minimoe.layers.latent_attention import LatentAttention
from minimoe.layers.module import Module
from minimoe.layers.moe import MoE


@dataclass(frozen=True)
class ForwardContext:
    """What all blocks of one forward pass share."""

    positions: Array  # [B or 1,T] int32: what rotary positions turn by
    places: Array | None  # [B,T] int32: what attention compares in their stead, where several documents lie in a row
    valid: Array | None  # [B,T] bool: keys that count; with a cache, the cache knows them
    token_valid: Array | None  # [B,T] bool: tokens that are routed
    rng: Rng | None
    cache: Cache | None


class Block(Module):
    """Attention, then a feed-forward layer, around the residual stream x [B,T,D].

    The output of a layer is added to the stream where the next norm reads it, in one pass. So a block takes the stream and what is still to
    be added to it (`delta`, or None), and returns both, with the stats of its routed layer or None.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        c = config
        out_std = c.init_std / math.sqrt(2 * c.n_layers)  # each block adds to the stream twice (Radford et al. 2019)
        self.pre = c.norm_position == "pre"
        self.attention_norm = Norm(c.d_model, c.norm, c.norm_eps, c.bias)
        options: dict[str, Any] = {
            "causal": c.causal, "window": c.window(layer), "rope_theta": c.rope_theta, "rope": c.rope, "max_seq_len": c.max_seq_len,
            "bias": c.attention_bias, "dropout": c.attention_dropout, "std": c.init_std, "out_std": out_std,
        }  # fmt: skip
        if c.mla is not None:
            self.attention: Attention = LatentAttention(c.d_model, c.n_heads, c.mla, interleaved=c.interleaved, **options)
        else:
            self.attention = Attention(
                c.d_model, c.n_heads, c.kv_heads, c.head_width, position=c.position, qk_norm=c.qk_norm, norm_eps=c.norm_eps,
                sinks=c.sinks, **options,
            )  # fmt: skip
        self.ffn_norm = Norm(c.d_model, c.norm, c.norm_eps, c.bias)
        self.routed = c.moe is not None and layer in c.moe_layers()
        if self.routed:
            self.moe = MoE(
                c.d_model, c.expert_hidden, c.activation, c.moe, bias=c.bias, limit=c.activation_limit, seed=None, std=c.init_std,
                out_std=out_std,
            )  # fmt: skip
        else:
            self.ffn = FeedForward(c.d_model, c.d_hidden, c.activation, c.bias, c.init_std, out_std)
        self.attention_dropout = Dropout(c.dropout, "attention")
        self.ffn_dropout = Dropout(c.dropout, "ffn")

    def __call__(
        self, x: Tensor, delta: Tensor | None, context: ForwardContext, layer: int
    ) -> tuple[Tensor, Tensor | None, MoEStats | None]:
        """x [B,T,D], delta [B,T,D] or None -> the same two after this block, stats"""
        if self.pre:
            x, h = (x, self.attention_norm(x)) if delta is None else self.attention_norm.after_add(x, delta)
        else:
            h = x
        cache = None if context.cache is None else context.cache.layers[layer]
        a = self.attention(h, context.positions, context.valid, context.rng, cache, context.places)
        a = self.attention_dropout(a, context.rng)
        if self.pre:
            x, h = self.ffn_norm.after_add(x, a)
            y, stats = self._feed_forward(h, context)
            return x, y, stats
        _, x = self.attention_norm.after_add(x, a)
        y, stats = self._feed_forward(x, context)
        return self.ffn_norm.after_add(x, y)[1], None, stats

    def _feed_forward(self, h: Tensor, context: ForwardContext) -> tuple[Tensor, MoEStats | None]:
        stats = None
        if self.routed:
            y, stats = self.moe(h, context.token_valid, context.rng)
        else:
            y = self.ffn(h)
        return self.ffn_dropout(y, context.rng), stats

    def recomputed(
        self, x: Tensor, delta: Tensor | None, context: ForwardContext, layer: int
    ) -> tuple[Tensor, Tensor | None, MoEStats | None]:
        """Call the block without keeping its inner activations; its differentiable statistics stay differentiable."""

        def run(x: Tensor, delta: Tensor | None = None) -> tuple[Any, ...]:
            y, dy, stats = self(x, delta, context, layer)
            if stats is None:
                return y, dy, None
            return y, dy, stats, stats.logits, stats.prob_sum, stats.own_loss

        y, dy, stats, *tensors = recompute(run, x) if delta is None else recompute(run, x, delta)
        if stats is None:
            return y, dy, None
        return y, dy, replace(stats, **dict(zip(("logits", "prob_sum", "own_loss"), tensors, strict=True)))
