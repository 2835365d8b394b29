"""The routed layer: a router picks experts for each token, a plan sorts the rows, the experts run, and the weighted rows come back.

`MoE` gives its output and `MoEStats`; nothing is stored on the module. Formulas: `reference/gating.py` (who is chosen, with what weight),
`reference/routing.py` (the plan, capacity), `reference/expert.py` (the experts); balance losses stand below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from minimoe import ops
from minimoe.autograd import Tensor, tensor
from minimoe.backend import Array, Backend
from minimoe.config import MoEConfig
from minimoe.nn import FeedForward, Module, Parameter, lowered, lowered_or_none
from minimoe.random import Rng
from minimoe.reference.gating import Gate, Rule


@dataclass(frozen=True)
class MoEStats:
    """What one routed layer did in one call; its losses are computed when they are first asked for. Counts are taken before capacity,
    over valid tokens."""

    logits: Tensor  # [N,E], without noise
    valid: Array | None  # [N] bool
    prob_sum: Tensor  # [E]: sum over tokens of the router's probabilities
    counts: Array  # [E] int32
    processed: Array  # [E] int32: rows that each expert worked on, after capacity
    tokens: Array | int  # valid tokens
    dropped: Array  # 0-d: fraction of the chosen slots that capacity dropped
    ids: Array  # [N,W] int32: the experts of each token (expert choice: -1 where not chosen)
    moe: MoEConfig
    own_loss: Tensor | None  # 0-d: noisy_topk's balance loss

    @property
    def coefs(self) -> tuple[float, float]:
        """What the two losses are multiplied with."""
        return self.moe.aux_loss_coef or 0.0, self.moe.z_loss_coef

    @cached_property
    def aux_loss(self) -> Tensor:
        """The raw balance loss: 1 when uniform (`mixtral`: k; noisy_topk's own: 0).   0-d"""
        return balance_loss(self, self.moe.k, self.moe.aux_convention) if self.own_loss is None else self.own_loss

    @cached_property
    def z_loss(self) -> Tensor:
        """The raw mean squared logsumexp of the logits; differentiable where it is added to the loss.   0-d"""
        logits = self.logits if self.moe.z_loss_coef else self.logits.detach()
        return mean_over_valid(ops.power(ops.logsumexp(logits), 2.0), self.valid)

    @property
    def loss(self) -> Tensor:
        """aux_loss_coef * aux_loss + z_loss_coef * z_loss, to be added to the task's loss.   0-d"""
        aux, z = self.coefs
        return self.aux_loss * aux + self.z_loss * z if z else self.aux_loss * aux

    @property
    def load(self) -> Array:
        """The fraction of all chosen slots that each expert got.   [E]"""
        backend = self.prob_sum.backend
        counts = backend.xp.astype(self.counts, self.prob_sum.dtype)
        return counts / backend.xp.clip(backend.xp.sum(counts), min=1.0)

    @property
    def entropy(self) -> Array:
        """Entropy of the load in nats: ln E when even, 0 when one expert takes all.   0-d"""
        xp = self.prob_sum.backend.xp
        load = self.load
        return -xp.sum(load * xp.log(xp.where(load > 0, load, xp.ones_like(load))))


class Router(Module):
    """Logits of each expert for each token, and the choice.   weight [E,D]"""

    def __init__(self, d_model: int, moe: MoEConfig, std: float) -> None:
        self.weight = Parameter(moe.n_experts, d_model, std=std)
        self.bias = Parameter(moe.n_experts, std=moe.router_bias_std, role="vector") if moe.router_bias else None
        if moe.router == "noisy_topk":
            self.noise_weight = Parameter(moe.n_experts, d_model)  # starts at zero: softplus(0) + 0.01 of noise (Shazeer et al. 2017)
        if moe.router == "sigmoid_bias":
            self.balance_bias = Parameter(moe.n_experts, role="vector", trainable=False)
        self.moe = moe
        self.rule = Rule(moe.router, moe.k, moe.norm_topk_prob, moe.n_groups, moe.top_groups, moe.route_scale)

    def __call__(self, x: Tensor, valid: Array | None, rng: Rng | None) -> tuple[Tensor, Tensor, Gate, Tensor, Tensor | None]:
        """x [N,D] -> combine weights [N,W], probability sums [E], the Gate, clean logits [N,E], own balance loss or None"""
        logits = self._logits(self._wide(x))
        chosen_by, sigma = logits, None
        if rng is not None and self.moe.noise_std:
            chosen_by = logits + self._normal(logits, rng, "noise") * self.moe.noise_std
        if rng is not None and self.moe.router == "noisy_topk":
            sigma = ops.softplus(ops.linear(self._wide(x), self.noise_weight)) + 0.01
            chosen_by = chosen_by + sigma * self._normal(logits, rng, "router_noise")
        bias = self.balance_bias.data if self.moe.router == "sigmoid_bias" else None
        weights, prob_sum, gate = ops.gate(chosen_by, bias, valid, self.rule)
        own = self._noisy_losses(logits, chosen_by, sigma, weights, gate, valid) if self.moe.router == "noisy_topk" else None
        return weights, prob_sum, gate, logits, own

    def _wide(self, x: Tensor) -> Tensor:
        """Router arithmetic is done in at least float32."""
        return ops.astype(x, x.backend.xp.result_type(x.dtype, x.backend.xp.float32))

    def _logits(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)

    def _normal(self, like: Tensor, rng: Rng, purpose: str) -> Tensor:
        b = like.backend
        draws = b.normal(math.prod(like.shape), rng.draw(self.path, purpose))
        return Tensor(b.xp.astype(b.xp.reshape(draws, like.shape), like.dtype, copy=False), b)

    def _noisy_losses(self, clean: Tensor, noisy: Tensor, sigma: Tensor | None, weights: Tensor, gate: Gate, valid: Array | None) -> Tensor:
        """CV^2(importance) + CV^2(load)   (Shazeer et al. 2017); without noise, or with k = E, the load is the plain count"""
        e, k = self.moe.n_experts, self.moe.k
        importance = ops.expert_sum(weights, gate.ids, valid, e)
        if sigma is not None and k < e:
            load = ops.noisy_load(clean, noisy, sigma, valid, k)
        else:
            load = Tensor(clean.backend.xp.astype(gate.counts, clean.dtype), clean.backend)
        return cv_squared(importance) + cv_squared(load)


def cv_squared(x: Tensor) -> Tensor:
    """The squared coefficient of variation, var(x) / (mean(x)^2 + 1e-10), population variance.   [E] -> 0-d"""
    mean = x.mean()
    centred = x - mean
    return (centred * centred).mean() / (mean * mean + 1e-10)


class Experts(Module):
    """All experts of a layer, stacked.   gate_up_proj [E,2H,D] (or up_proj [E,H,D]), down_proj [E,D,H]; biases [E,...]"""

    on_demand: Callable[[Array], AbstractContextManager[None]] = staticmethod(lambda offsets: nullcontext())
    """Entered with the plan's offsets while the experts run: where they are read from a file, those that get a row are there then."""

    def __init__(
        self, e: int, d_model: int, d_hidden: int, activation: str, bias: bool, std: float, out_std: float, limit: float = 0.0
    ) -> None:
        self.activation, self.limit = activation, limit
        up = Parameter(e, 2 * d_hidden if activation == "swiglu" else d_hidden, d_model, std=std)
        up_bias = Parameter(e, up.shape[1], role="vector") if bias else None
        if activation == "swiglu":
            self.gate_up_proj, self.gate_up_bias = up, up_bias
        else:
            self.up_proj, self.up_bias = up, up_bias
        self.down_proj = Parameter(e, d_model, d_hidden, std=out_std)
        self.down_bias = Parameter(e, d_model, role="vector") if bias else None

    def __call__(self, x: Tensor, weights: Tensor, plan: Any) -> Tensor:
        """x [N,D], combine weights [N,W] -> [N,D]"""
        if self.activation == "swiglu":
            up, up_bias = self.gate_up_proj, self.gate_up_bias
        else:
            up, up_bias = self.up_proj, self.up_bias
        with self.on_demand(plan.offsets):
            w_up, w_down = lowered(up, x), lowered(self.down_proj, x)
            biases = lowered_or_none(up_bias, x), lowered_or_none(self.down_bias, x)
            return ops.moe_ffn(x, weights, plan, w_up, w_down, *biases, self.activation, self.limit)


class MoE(Module):
    """A feed-forward layer of n_experts, of which each token uses top_k.   y, stats = layer(x)"""

    def __init__(
        self, d_model: int, d_hidden: int, activation: str = "swiglu", moe: MoEConfig | None = None, *, bias: bool = False,
        limit: float = 0.0, dtype: str = "float32", seed: int | None = 0, std: float = 0.02, out_std: float | None = None,
        backend: Backend | None = None,
    ) -> None:  # fmt: skip
        """`seed` None leaves the parameters to a surrounding module's init. `d_hidden`: of one expert. `limit` > 0: swiglu clipped."""
        self.moe = moe = MoEConfig() if moe is None else moe
        hidden = d_hidden if moe.d_hidden is None else moe.d_hidden
        out_std = std if out_std is None else out_std
        self.router = Router(d_model, moe, std)
        self.experts = Experts(moe.n_experts, d_model, hidden, activation, bias, std, out_std, limit)
        if moe.n_shared_experts:
            self.shared = FeedForward(d_model, moe.n_shared_experts * hidden, activation, bias, std, out_std)
        if seed is not None:
            self.init(seed, dtype, backend)

    def __call__(self, x: Tensor, valid: Any = None, rng: Rng | None = None) -> tuple[Tensor, MoEStats]:
        """x [...,D], valid [...] bool (False: padding, neither routed nor counted) -> y [...,D], stats

        `rng` None means evaluation: no noise, no jitter, no capacity.
        """
        shape, b = x.shape, x.backend
        x = x.reshape(-1, shape[-1])
        valid = _valid_rows(valid, b, x.shape[0])
        for_router = x
        if rng is not None and self.moe.jitter:
            for_router = x * self._jitter(x, rng)
            x = for_router if self.moe.jitter_experts else x
        weights, prob_sum, gate, logits, own_loss = self.router(for_router, valid, rng)
        plan = self._plan(gate, valid, x.shape[0], b, training=rng is not None)
        y = self.experts(x, weights, plan)
        if self.moe.n_shared_experts:
            y = y + self.shared(x)
        stats = self._stats(gate, prob_sum, logits, own_loss, plan.offsets, valid)
        return y.reshape(shape), stats

    def _plan(self, gate: Gate, valid: Array | None, n: int, b: Backend, training: bool) -> Any:
        """Which row goes where.   -> Plan"""
        moe = self.moe
        e, k = moe.n_experts, moe.k
        rows = e * int(b.choice_size(n, None, k, e)) if moe.router == "expert_choice" else n * k
        capacity = b.capacity(n, valid, k, e, moe.capacity_factor) if training and moe.capacity_factor else None
        return b.route(gate.ids, gate.weights, valid, n_experts=e, rows=rows, capacity=capacity, priority=moe.drop_priority)

    def _jitter(self, x: Tensor, rng: Rng) -> Tensor:
        """U(1 - e, 1 + e) for each number.   [N,D]"""
        b = x.backend
        u = b.xp.reshape(b.uniform(math.prod(x.shape), rng.draw(self.router.path, "jitter")), x.shape)
        return Tensor(b.xp.astype(1.0 + self.moe.jitter * (2.0 * u - 1.0), x.dtype, copy=False), b)

    def _stats(
        self, gate: Gate, prob_sum: Tensor, logits: Tensor, own_loss: Tensor | None, offsets: Array, valid: Array | None
    ) -> MoEStats:
        b, moe = logits.backend, self.moe
        tokens, processed = b.n_valid(logits.shape[0], valid), offsets[1:] - offsets[:-1]
        dropped = self._dropped(gate, offsets, b, prob_sum.dtype)
        return MoEStats(logits, valid, prob_sum, gate.counts, processed, tokens, dropped, gate.ids, moe, own_loss)

    def _dropped(self, gate: Gate, offsets: Array, b: Backend, dtype: Any) -> Array:
        xp = b.xp
        if not self.moe.capacity_factor:
            return xp.zeros((), dtype=dtype)
        chosen = xp.astype(xp.sum(gate.counts), dtype)
        return (chosen - xp.astype(offsets[-1], dtype)) / xp.clip(chosen, min=1.0)

    def update_balance(self, counts: Array, ok: Array | None = None) -> None:
        """After an optimizer step: b += bias_rate * sign(mean(count) - count), with the whole step's counts [E]; not where `ok` is false.

        (DeepSeek-V3; a router other than sigmoid_bias has nothing to update.)
        """
        if self.moe.router != "sigmoid_bias":
            return
        b = self.router.balance_bias
        xp = b.backend.xp
        counts = xp.astype(counts, b.dtype)
        change = self.moe.bias_rate * xp.sign(xp.mean(counts) - counts)
        bias = b.own()
        bias += change if ok is None else xp.where(ok, change, xp.zeros_like(change))


def _valid_rows(valid: Any, b: Backend, n: int) -> Array | None:
    """A mask of any shape and library as bool [N]."""
    if valid is None:
        return None
    if not isinstance(valid, type(b.xp.zeros(()))):
        valid = tensor(valid, backend=b).data
    return b.xp.reshape(b.xp.astype(valid, b.xp.bool), (n,))


def mean_over_valid(x: Tensor, valid: Array | None) -> Tensor:
    """The mean over valid tokens; 0 where there is none.   [N] -> 0-d"""
    if valid is None:
        return x.sum() * (1.0 / max(1, x.size))
    xp = x.backend.xp
    count = xp.clip(xp.sum(xp.astype(valid, x.dtype)), min=1.0)
    return ops.where(valid, x, 0.0).sum() * Tensor(1.0 / count, x.backend)


# ---- balance losses: E sum_i f_i P_i, and how layers are joined -----------------------------------------------------------------------


def balance_loss(stats: MoEStats, k: int, convention: str) -> Tensor:
    """E * sum_i f_i P_i of one layer, f_i = count_i / (N k), P_i = mean p_i: 1 when uniform (Fedus et al. 2021). `mixtral`: times k."""
    loss = _f_times_p(stats.prob_sum, stats.counts, stats.tokens, k)
    return loss * float(k) if convention == "mixtral" else loss


def _f_times_p(prob_sum: Tensor, counts: Array, tokens: Array | int, k: int) -> Tensor:
    """E * sum_i count_i / (N k) * prob_sum_i / N"""
    b = prob_sum.backend
    xp, dtype = b.xp, prob_sum.dtype
    if hasattr(tokens, "dtype"):
        n = xp.clip(xp.astype(tokens, dtype), min=1.0)
        f = xp.astype(counts, dtype) * (counts.shape[0] / k) / n / n
    else:
        f = xp.astype(counts, dtype) * (counts.shape[0] / k / max(tokens, 1) ** 2)
    return (prob_sum * Tensor(f, b)).sum()


def joined_aux_loss(layers: list[MoEStats], moe: MoEConfig) -> Tensor:
    """The balance loss of a model, raw: `switch` sums its layers', `megablocks` averages, `mixtral` pools f and P over layers first."""
    if moe.aux_convention == "mixtral" and moe.router != "noisy_topk":
        prob_sum, counts = layers[0].prob_sum, layers[0].counts
        for stats in layers[1:]:
            prob_sum, counts = prob_sum + stats.prob_sum, counts + stats.counts
        return _f_times_p(prob_sum, counts, layers[0].tokens * len(layers), moe.k) * float(moe.k)
    total = layers[0].aux_loss
    for stats in layers[1:]:
        total = total + stats.aux_loss
    return total * (1.0 / len(layers)) if moe.aux_convention == "megablocks" else total


def joined_z_loss(layers: list[MoEStats]) -> Tensor:
    """The mean over layers."""
    total = layers[0].z_loss
    for stats in layers[1:]:
        total = total + stats.z_loss
    return total * (1.0 / len(layers))


def uniform_aux_loss(moe: MoEConfig, n_layers: int) -> float:
    """What the raw balance loss of a model is when the load is even."""
    if moe.router == "noisy_topk":
        return 0.0
    return {"switch": float(n_layers), "megablocks": 1.0, "mixtral": float(moe.k)}[moe.aux_convention]
