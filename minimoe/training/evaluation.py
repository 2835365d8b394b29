"""Evaluation: a model's mean cross-entropy and accuracy on held-out data, without noise, dropout or capacity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from minimoe.backend import Array
from minimoe.engine import ops
from minimoe.engine.grad_mode import no_grad
from minimoe.layers.balance import MoEStats
from minimoe.model.transformer import Transformer
from minimoe.reference.loss import IGNORE

Tokens = npt.NDArray[np.int32]
Batches: TypeAlias = Iterable[tuple[npt.NDArray[Any], ...]]
"""(inputs, targets), (inputs, targets, valid) or (inputs, targets, valid, document_starts). `valid` [B,T] is 0 for padding; without it,
padding is what has no target."""


@dataclass(frozen=True)
class Evaluation:
    """The result of one pass over held-out data."""

    loss: float  # nats per target
    tokens: int  # targets: tokens, masked tokens or images
    expert_load: list[list[float]]  # [layer][expert], fractions
    domain_load: list[list[list[float]]] | None = None  # [domain][layer][expert]
    accuracy: float | None = None  # the share of targets that have the highest logit; None for a language model
    n_bytes: int | None = None  # UTF-8 bytes of the targets' text; None if they are not counted

    @property
    def bits_per_byte(self) -> float | None:
        """All the targets' cross-entropy, in bits, over their bytes; None without any byte that is counted."""
        return self.loss * self.tokens / math.log(2) / self.n_bytes if self.n_bytes else None

    @property
    def perplexity(self) -> float:
        return float(np.exp(min(self.loss, 700.0)))


def evaluate(
    model: Transformer, batches: Batches, domains: Iterable[Tokens] | None = None, n_domains: int = 0,
    after_batch: Callable[[], None] | None = None, token_bytes: Tokens | None = None,
) -> Evaluation:  # fmt: skip
    """Average over all targets that are not -100. With `domains` [B,T] for each batch, the load is also counted by domain.

    `token_bytes` [V]: how many bytes of the text each token stands for; those of the targets are then counted.

    Sums stay on the device until the end. `after_batch` is called after each batch, and may end the evaluation by raising.
    """
    b = model.backend
    xp = b.xp
    total: Any = 0.0
    right: Any = 0  # targets that have the highest logit
    count = n_bytes = 0
    loads: list[Any] = []
    by_domain: list[list[Any]] = [[] for _ in range(n_domains)]
    sides = iter(domains) if domains is not None else None
    with no_grad():
        for inputs, targets, *given in batches:
            valid = given[0] if given else (targets >= 0).astype(np.int32)
            starts = given[1] if len(given) > 1 else None
            loss, hits, stats = _scored(model, inputs, targets, None if valid.all() else valid, starts)
            total, right, count = total + loss, right + hits, count + int((targets >= 0).sum())
            if token_bytes is not None:
                n_bytes += int(token_bytes[targets[targets >= 0]].sum())
            loads = _added(loads, [layer.counts for layer in stats])
            if sides is not None:
                side = np.where(valid != 0, next(sides), -1).reshape(-1)
                for domain in range(n_domains):
                    here = b.from_host((side == domain).astype(np.int32))
                    counts = [_count_where(xp, layer.ids, here, layer.counts.shape[0]) for layer in stats]
                    by_domain[domain] = _added(by_domain[domain], counts)
            if after_batch is not None:
                after_batch()
    fractions = [_fractions(b.to_host(layer)) for layer in loads]
    domain_fractions = [[_fractions(b.to_host(layer)) for layer in domain] for domain in by_domain] if n_domains else None
    if not count:
        return Evaluation(float("nan"), 0, fractions, domain_fractions)
    accuracy = None if model.config.head == "lm" else float(b.to_host(right)) / count
    counted = None if token_bytes is None else n_bytes
    return Evaluation(float(b.to_host(total)) / count, count, fractions, domain_fractions, accuracy, counted)


def _scored(
    model: Transformer, inputs: npt.NDArray[Any], targets: npt.NDArray[Any], mask: npt.NDArray[Any] | None, starts: npt.NDArray[Any] | None
) -> tuple[Array, Array, list[MoEStats]]:
    """Return the sum of a batch's cross-entropies, how many targets have the highest logit (0 for a language model), and the stats."""
    if model.config.head == "lm":  # its loss is computed without whole rows of logits
        parts = model.loss(inputs, targets, attention_mask=mask, document_starts=starts)
        return parts.cross_entropy.data * float((targets >= 0).sum()), 0, parts.stats
    b, xp = model.backend, model.backend.xp
    x, stats = model.hidden(inputs, mask, document_starts=starts)
    logits = model.logits(x)
    logits, flat = logits.reshape(-1, logits.shape[-1]), b.from_host(targets.reshape(-1))
    total, _ = ops.cross_entropy(logits, flat, IGNORE)
    _, predicted = b.top_k(logits.data, 1)  # [N,1]
    return total.data, xp.sum(xp.astype(predicted[:, 0] == flat, xp.int32)), stats


def _added(sums: list[Any], counts: list[Any]) -> list[Any]:
    return [a + c for a, c in zip(sums, counts, strict=True)] if sums else counts


def _count_where(xp: Any, ids: Any, here: Any, e: int) -> Any:
    """Count how many slots of the tokens marked in `here` [N] went to each expert.   ids [N,W] -> [E]"""
    hit = ids[:, :, None] == xp.arange(e, dtype=ids.dtype)
    return xp.sum(xp.astype(hit, xp.int32) * here[:, None, None], axis=(0, 1))


def _fractions(counts: npt.NDArray[Any]) -> list[float]:
    return [float(c) for c in counts / max(1, int(counts.sum()))]
