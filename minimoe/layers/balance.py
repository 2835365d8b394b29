"""What a routed layer did, and the balance losses that keep its experts evenly used."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from minimoe.backend import Array
from minimoe.config import MoEConfig
from minimoe.engine import ops
from minimoe.engine.tensor import Tensor


@dataclass(frozen=True)
class MoEStats:
    """What one routed layer did in one call. Its losses are computed when they are first read. Counts are taken over valid tokens, before
    capacity."""

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
    def coefficients(self) -> tuple[float, float]:
        """The coefficients of the two losses."""
        return self.moe.aux_loss_coef or 0.0, self.moe.z_loss_coef

    @cached_property
    def aux_loss(self) -> Tensor:
        """The balance loss without its coefficient: 1 if the load is uniform (`mixtral`: k; noisy_topk: 0).   0-d"""
        return balance_loss(self, self.moe.k, self.moe.aux_convention) if self.own_loss is None else self.own_loss

    @cached_property
    def z_loss(self) -> Tensor:
        """The mean squared logsumexp of the logits, without its coefficient; differentiable if it is added to the loss.   0-d"""
        logits = self.logits if self.moe.z_loss_coef else self.logits.detach()
        return mean_over_valid(ops.power(ops.logsumexp(logits), 2.0), self.valid)

    @property
    def loss(self) -> Tensor:
        """aux_loss_coef * aux_loss + z_loss_coef * z_loss, to be added to the task's loss.   0-d"""
        aux, z = self.coefficients
        return self.aux_loss * aux + self.z_loss * z if z else self.aux_loss * aux

    @property
    def load(self) -> Array:
        """The fraction of all chosen slots that each expert got.   [E]"""
        backend = self.prob_sum.backend
        counts = backend.xp.astype(self.counts, self.prob_sum.dtype)
        return counts / backend.xp.clip(backend.xp.sum(counts), min=1.0)

    @property
    def entropy(self) -> Array:
        """The entropy of the load in nats: ln E if even, 0 if one expert takes all.   0-d"""
        xp = self.prob_sum.backend.xp
        load = self.load
        return -xp.sum(load * xp.log(xp.where(load > 0, load, xp.ones_like(load))))


def cv_squared(x: Tensor) -> Tensor:
    """Return the squared coefficient of variation, var(x) / (mean(x)^2 + 1e-10), population variance.   [E] -> 0-d"""
    mean = x.mean()
    centred = x - mean
    return (centred * centred).mean() / (mean * mean + 1e-10)


def mean_over_valid(x: Tensor, valid: Array | None) -> Tensor:
    """Return the mean over valid tokens; 0 if there are none.   [N] -> 0-d"""
    if valid is None:
        return x.sum() * (1.0 / max(1, x.size))
    xp = x.backend.xp
    count = xp.clip(xp.sum(xp.astype(valid, x.dtype)), min=1.0)
    return ops.where(valid, x, 0.0).sum() * Tensor(1.0 / count, x.backend)


# ---- balance losses: E sum_i f_i P_i, and how those of layers are combined ------------------------------------------------------------


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
    """Return the balance loss of a model: `switch` sums over layers, `megablocks` averages, `mixtral` pools f and P first."""
    if moe.aux_convention == "mixtral" and moe.router_facts.balance == "counts":
        prob_sum, counts = layers[0].prob_sum, layers[0].counts
        for stats in layers[1:]:
            prob_sum, counts = prob_sum + stats.prob_sum, counts + stats.counts
        return _f_times_p(prob_sum, counts, layers[0].tokens * len(layers), moe.k) * float(moe.k)
    total = layers[0].aux_loss
    for stats in layers[1:]:
        total = total + stats.aux_loss
    return total * (1.0 / len(layers)) if moe.aux_convention == "megablocks" else total


def joined_z_loss(layers: list[MoEStats]) -> Tensor:
    """Return the mean z-loss over layers."""
    total = layers[0].z_loss
    for stats in layers[1:]:
        total = total + stats.z_loss
    return total * (1.0 / len(layers))


def uniform_aux_loss(moe: MoEConfig, n_layers: int) -> float:
    """Return the balance loss, without its coefficient, of a model whose load is even."""
    if moe.router_facts.balance == "importance":
        return 0.0
    return {"switch": float(n_layers), "megablocks": 1.0, "mixtral": float(moe.k)}[moe.aux_convention]
