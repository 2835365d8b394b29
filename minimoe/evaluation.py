"""Evaluation: the mean cross-entropy of a model over windows of text, without noise, dropout or capacity."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minimoe.autograd import no_grad
from minimoe.model import Transformer

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Evaluation:
    """What one pass over a text showed."""

    loss: float  # nats a token
    tokens: int
    expert_load: list[list[float]]  # [layer][expert], fractions
    domain_load: list[list[list[float]]] | None = None  # [domain][layer][expert]

    @property
    def perplexity(self) -> float:
        return float(np.exp(min(self.loss, 700.0)))


def evaluate(
    model: Transformer, windows: Iterable[tuple[Tokens, Tokens]], domains: Iterable[Tokens] | None = None, n_domains: int = 0
) -> Evaluation:
    """The mean over all targets that are not -100. `domains` [B,T] beside each window: the load is then told apart by domain as well.

    Sums stay on the device until the end.
    """
    b = model.backend
    xp = b.xp
    total: Any = 0.0
    count: Any = 0.0
    loads: list[Any] = []
    by_domain: list[list[Any]] = [[] for _ in range(n_domains)]
    sides = iter(domains) if domains is not None else None
    with no_grad():
        for tokens, targets in windows:
            mask = None if (targets >= 0).all() else (targets >= 0).astype(np.int32)
            parts = model.loss(tokens, targets, attention_mask=mask)
            n = float((targets >= 0).sum())
            total, count = total + parts.cross_entropy.data * n, count + n
            counts = [stats.counts for stats in parts.stats]
            loads = counts if not loads else [a + c for a, c in zip(loads, counts, strict=True)]
            if sides is None:
                continue
            side = np.where(targets >= 0, next(sides), -1).reshape(-1)
            for domain in range(n_domains):
                here = b.from_host((side == domain).astype(np.int32))
                counts = [_count_where(xp, stats.ids, here, stats.counts.shape[0]) for stats in parts.stats]
                old = by_domain[domain]
                by_domain[domain] = counts if not old else [a + c for a, c in zip(old, counts, strict=True)]
    fractions = [_fractions(b.to_host(layer)) for layer in loads]
    told = [[_fractions(b.to_host(layer)) for layer in domain] for domain in by_domain] if n_domains else None
    loss = float(b.to_host(total)) / count if count else float("nan")
    return Evaluation(loss, int(count), fractions, told)


def _count_where(xp: Any, ids: Any, here: Any, e: int) -> Any:
    """How many slots of the tokens marked in `here` [N] went to each expert.   ids [N,W] -> [E]"""
    hit = ids[:, :, None] == xp.arange(e, dtype=ids.dtype)
    return xp.sum(xp.astype(hit, xp.int32) * here[:, None, None], axis=(0, 1))


def _fractions(counts: npt.NDArray[Any]) -> list[float]:
    return [float(c) for c in counts / max(1, int(counts.sum()))]
