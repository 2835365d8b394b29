"""The routed layer: a router picks experts for each token, a plan sorts the rows, the experts run, and the weighted rows come back.

`MoE` returns its output and `MoEStats`; nothing is stored on the module. Formulas: `reference/routers.py` (which experts, what weights),
`reference/routing.py` (the plan, capacity), `reference/expert.py` (the experts); `balance.py` (balance losses).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from minimoe.backend import Array, Backend
from minimoe.config import MoEConfig
from minimoe.engine import ops
from minimoe.engine.creation import tensor
from minimoe.engine.grad_mode import grad_enabled
from minimoe.engine.random import Rng
from minimoe.engine.tensor import Tensor
from minimoe.errors import ConfigError
from minimoe.layers.balance import MoEStats, cv_squared
from minimoe.layers.dense import FeedForward
from minimoe.layers.low_rank import Adapter, adapted
from minimoe.layers.module import Module, Parameter, Role, cast_like, cast_like_or_none
from minimoe.reference.gating import Gate
from minimoe.reference.routers import Adjust


class Router(Module):
    """Computes a logit for each token and expert, and chooses experts by them.   weight [E,D]"""

    def __init__(self, d_model: int, moe: MoEConfig, std: float) -> None:
        self.weight = Parameter(moe.n_experts, d_model, std=std)
        self.bias = Parameter(moe.n_experts, std=moe.router_bias_std, role="vector") if moe.router_bias else None
        for array in moe.router_facts.state:
            shape = array.shape(moe.n_experts, d_model)
            role: Role = "matrix" if len(shape) > 1 else "vector"
            setattr(self, array.name, Parameter(*shape, start=array.start, role=role, trainable=array.trainable))
        self.moe, self.rule = moe, moe.rule

    def state_for(self, use: str) -> Parameter | None:
        """Return the parameter that has this use in the router's entry of the table, or None."""
        array = self.moe.router_facts.state_for(use)
        found: Parameter | None = None if array is None else getattr(self, array.name)
        return found

    def __call__(self, x: Tensor, valid: Array | None, rng: Rng | None) -> tuple[Tensor, Tensor, Gate, Tensor, Tensor | None]:
        """x [N,D] -> combine weights [N,W], probability sums [E], the Gate, clean logits [N,E], own balance loss or None"""
        self._check_gradient()
        logits = self._logits(self._wide(x))
        chosen_by, sigma = logits, None
        if rng is not None and self.moe.noise_std:
            chosen_by = logits + self._normal(logits, rng, "noise") * self.moe.noise_std
        noise_weight = self.state_for("noise")
        if rng is not None and noise_weight is not None:
            sigma = ops.softplus(ops.linear(self._wide(x), noise_weight)) + 0.01
            chosen_by = chosen_by + sigma * self._normal(logits, rng, "router_noise")
        bias = self.state_for("bias")
        weights, prob_sum, gate = ops.gate(chosen_by, None if bias is None else bias.data, valid, self.rule)
        own_losses = self.moe.router_facts.balance == "importance"
        own = self._noisy_losses(logits, chosen_by, sigma, weights, gate, valid) if own_losses else None
        return weights, prob_sum, gate, logits, own

    def _check_gradient(self) -> None:
        """Refuse to build a graph in which the task's loss cannot reach the router. Raises ConfigError."""
        if grad_enabled() and self.weight.requires_grad:
            problem = self.moe.router_facts.constant_weight(self.moe)
            if problem is not None:
                raise ConfigError(f"{problem}; for inference, call the layer under no_grad()")

    def _wide(self, x: Tensor) -> Tensor:
        """Return x in the router's dtype, at least float32."""
        return ops.astype(x, x.backend.xp.result_type(x.dtype, x.backend.xp.float32))

    def _logits(self, x: Tensor) -> Tensor:
        logits = ops.linear(x, self.weight, self.bias)
        adjust, learned = self.moe.router_facts.adjust, self.state_for("logits")
        return logits if adjust is None or learned is None else adjusted_logits(logits, learned, adjust)

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


def adjusted_logits(logits: Tensor, learned: Tensor, adjust: Adjust) -> Tensor:
    """Return the logits, changed by an array that the router learns.   [N,E], [E] -> [N,E]"""
    b, z, w = logits.backend, logits.data, learned.data

    def backward(dy: Array) -> tuple[Array, Array]:
        return adjust.backward(b, dy, z, w)

    adjusted: Tensor = Tensor.from_op(adjust.forward(b, z, w), (logits, learned), backward)
    return adjusted


class Experts(Module):
    """All experts of a layer, stacked.   gate_up_proj [E,2H,D] (or up_proj [E,H,D]), down_proj [E,D,H]; biases [E,...]"""

    on_demand: Callable[[Array], AbstractContextManager[None]] = staticmethod(lambda offsets: nullcontext())
    """Takes the plan's offsets and returns a context in which the experts run: it reads those with rows that are still in a file."""

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
        self.up_lora: Adapter | None = None
        self.down_lora: Adapter | None = None

    def __call__(self, x: Tensor, weights: Tensor, plan: Any) -> Tensor:
        """x [N,D], combine weights [N,W] -> [N,D]"""
        if self.activation == "swiglu":
            up, up_bias = self.gate_up_proj, self.gate_up_bias
        else:
            up, up_bias = self.up_proj, self.up_bias
        with self.on_demand(plan.offsets):
            w_up, w_down = cast_like(adapted(up, self.up_lora), x), cast_like(adapted(self.down_proj, self.down_lora), x)
            biases = cast_like_or_none(up_bias, x), cast_like_or_none(self.down_bias, x)
            return ops.moe_ffn(x, weights, plan, w_up, w_down, *biases, self.activation, self.limit)


class MoE(Module):
    """A feed-forward layer of n_experts, top_k of which each token uses.   y, stats = layer(x)"""

    def __init__(
        self, d_model: int, d_hidden: int, activation: str = "swiglu", moe: MoEConfig | None = None, *, bias: bool = False,
        limit: float = 0.0, dtype: str = "float32", seed: int | None = 0, std: float = 0.02, out_std: float | None = None,
        backend: Backend | None = None,
    ) -> None:  # fmt: skip
        """`seed` None: a surrounding module's init fills the parameters. `d_hidden`: width of one expert. `limit` > 0 clips swiglu."""
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
        """Plan which row goes to which expert.   -> Plan"""
        moe = self.moe
        e, k = moe.n_experts, moe.k
        rows = e * int(b.choice_size(n, None, k, e)) if moe.router_facts.by_expert else n * k
        capacity = b.capacity(n, valid, k, e, moe.capacity_factor) if training and moe.capacity_factor else None
        return b.route(gate.ids, gate.weights, valid, n_experts=e, rows=rows, capacity=capacity, priority=moe.drop_priority)

    def _jitter(self, x: Tensor, rng: Rng) -> Tensor:
        """Draw from U(1 - jitter, 1 + jitter) for each number.   [N,D]"""
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
        """Update the bias after a step, unless `ok` is false: b += bias_rate * sign(mean(count) - count), with the step's counts [E].

        (DeepSeek-V3; a router without a bias has nothing to update.)
        """
        b = self.router.state_for("bias")
        if b is None or b.frozen:
            return
        xp = b.backend.xp
        counts = xp.astype(counts, b.dtype)
        change = self.moe.bias_rate * xp.sign(xp.mean(counts) - counts)
        bias = b.own()
        bias += change if ok is None else xp.where(ok, change, xp.zeros_like(change))


def _valid_rows(valid: Any, b: Backend, n: int) -> Array | None:
    """Return a mask of any shape and library as bool [N]."""
    if valid is None:
        return None
    if not isinstance(valid, type(b.xp.zeros(()))):
        valid = tensor(valid, backend=b).data
    return b.xp.reshape(b.xp.astype(valid, b.xp.bool), (n,))
