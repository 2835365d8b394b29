"""Feed-forward layers, dense and routed, and the gate that routes."""

from __future__ import annotations

from minimoe.backend import Array
from minimoe.engine.buffers import Out
from minimoe.engine.tensor import Tensor
from minimoe.reference.expert import ExpertWeights
from minimoe.reference.gating import Gate, Rule
from minimoe.reference.routing import Plan


def gate(logits: Tensor, bias: Array | None, valid: Array | None, rule: Rule) -> tuple[Tensor, Tensor, Gate]:
    """Choose experts.   logits [N,E] -> combine weights [N,W], probability sums [E], and the whole Gate as arrays"""
    b = logits.backend
    result = b.gate(logits.data, bias, valid, rule=rule)

    def backward(dweights: Array | None, dprob_sum: Array | None) -> Array:
        return b.gate_backward(dweights, dprob_sum, result, valid, rule=rule)

    weights, prob_sum = Tensor.from_op((result.weights, result.prob_sum), (logits,), backward)
    return weights, prob_sum, result


def noisy_load(clean: Tensor, noisy: Tensor, sigma: Tensor, valid: Array | None, k: int) -> Tensor:
    """Compute the smooth load of noisy top-k gating.   [N,E] each -> [E]"""
    b, za, ha, sa = clean.backend, clean.data, noisy.data, sigma.data
    load, ids = b.noisy_load(za, ha, sa, valid, k=k)
    return Tensor.from_op(load, (clean, noisy, sigma), lambda dy: b.noisy_load_backward(dy, za, ha, sa, ids, valid, k=k))


def expert_sum(weights: Tensor, ids: Array, valid: Array | None, n_experts: int) -> Tensor:
    """Sum the combine weights of each expert (its importance).   weights [N,K], ids [N,K] -> [E]"""
    xp, experts = weights.backend.xp, weights.backend.xp.arange(n_experts, dtype=ids.dtype)
    hit = ids[:, :, None] == experts  # [N,K,E]
    if valid is not None:
        hit = hit & valid[:, None, None]
    mask = xp.astype(hit, weights.dtype)
    y = xp.sum(mask * weights.data[:, :, None], axis=(0, 1))
    return Tensor.from_op(y, (weights,), lambda dy: xp.sum(mask * dy, axis=-1))


def ffn(x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None, activation: str) -> Tensor:
    """down(activation(up(x))), fused.   x [...,D], up [O,D], down [D,H], biases [O], [D] -> [...,D]"""
    b = x.backend
    optional = [t for t in (up_bias, down_bias) if t is not None]
    weights = ExpertWeights(up.data, down.data, *(None if t is None else t.data for t in (up_bias, down_bias)))
    y, saved = b.ffn(x.data, weights, activation)

    def backward(dy: Array, outs: list[Out]) -> tuple[Array, ...]:
        dx, dweights = b.ffn_backward(dy, saved, activation, **weight_out(outs[1:], weights))
        return (dx, *(d for d in dweights if d is not None))

    return Tensor.from_op(y, (x, up, down, *optional), backward, outs=True)


def moe_ffn(
    x: Tensor, gate_weights: Tensor, plan: Plan, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None,
    activation: str, limit: float = 0.0,
) -> Tensor:  # fmt: skip
    """Dispatch, experts, combine.   x [N,D], gate_weights [N,W], up [E,O,D], down [E,D,H]; limit > 0: clipped swiglu -> [N,D]"""
    b = x.backend
    optional = [t for t in (up_bias, down_bias) if t is not None]
    weights = ExpertWeights(up.data, down.data, *(None if t is None else t.data for t in (up_bias, down_bias)))
    y, saved = b.moe_ffn(x.data, gate_weights.data, plan, weights, activation, limit)

    def backward(dy: Array, outs: list[Out]) -> tuple[Array, ...]:
        dx, dgate, dexperts = b.moe_ffn_backward(dy, saved, activation, limit, **weight_out(outs[2:], weights))
        return (dx, dgate, *(d for d in dexperts if d is not None))

    return Tensor.from_op(y, (x, gate_weights, up, down, *optional), backward, outs=True)


def weight_out(outs: list[Out], weights: ExpertWeights) -> Out:
    """Return the keywords of one kernel that writes the gradients of all weights; {} if it cannot treat them alike."""
    if not all(outs) or len({out["accumulate"] for out in outs}) > 1:
        return {}
    arrays = iter(out["out"] for out in outs)
    return {"out": ExpertWeights(*(None if w is None else next(arrays) for w in weights)), "accumulate": outs[0]["accumulate"]}
