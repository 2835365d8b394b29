"""The loss of a batch: cross-entropy, and what the routers add to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from minimoe.backend import Array
from minimoe.config import MoEConfig
from minimoe.engine.tensor import Tensor
from minimoe.layers.balance import MoEStats, joined_aux_loss, joined_z_loss


@dataclass(frozen=True)
class LossParts:
    """The loss of a batch and its parts, 0-d tensors in nats."""

    total: Tensor  # cross_entropy + router_loss
    cross_entropy: Tensor  # mean over valid targets
    router_loss: Tensor | None  # weighted, as it is added; None without routed layers
    aux_loss: Tensor | None  # not weighted; layers are joined by moe.aux_convention
    stats: list[MoEStats]  # of each routed layer

    @cached_property
    def z_loss(self) -> Tensor | None:
        """Not weighted, the mean over layers; None without routed layers."""
        return joined_z_loss(self.stats) if self.stats else None

    def weighted(self, weight: Array) -> LossParts:
        """Return the same loss with another weight of the cross-entropy beside the routers' losses.   weight []"""
        cross_entropy = self.cross_entropy * Tensor(weight, self.cross_entropy.backend)
        total = cross_entropy if self.router_loss is None else cross_entropy + self.router_loss
        return replace(self, total=total, cross_entropy=cross_entropy)


def loss_parts(cross_entropy: Tensor, stats: list[MoEStats], moe: MoEConfig | None) -> LossParts:
    """Add the routers' losses, weighted, to the cross-entropy:  total = cross_entropy + aux_coef * aux + z_coef * z."""
    if not stats or moe is None:
        return LossParts(cross_entropy, cross_entropy, None, None, stats)
    aux, (aux_coef, z_coef) = joined_aux_loss(stats, moe), stats[0].coefficients
    router_loss = aux * aux_coef
    if z_coef:
        router_loss = router_loss + joined_z_loss(stats) * z_coef
    return LossParts(cross_entropy + router_loss, cross_entropy, router_loss, aux, stats)
