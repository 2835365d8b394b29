"""Low-rank adapters: W + scale B A in place of W (Hu et al. 2021). A is drawn and B is zero, so that training starts from W."""

from __future__ import annotations

import math

from minimoe.engine import ops
from minimoe.engine.tensor import Tensor
from minimoe.layers.module import Module, Parameter


class Adapter(Module):
    """The pair of a product W [O,I], or of all experts' [E,O,I].   a [...,r,I], b [...,O,r]"""

    def __init__(self, a: tuple[int, ...], b: tuple[int, ...], scale: float) -> None:
        self.a = Parameter(*a, std=1.0 / math.sqrt(a[-1]))
        self.b = Parameter(*b)
        self.scale = scale

    def __call__(self, weight: Tensor) -> Tensor:
        """W + scale B A"""
        return ops.low_rank(weight, self.a, self.b, self.scale)


def adapted(weight: Tensor, adapter: Adapter | None) -> Tensor:
    """Return a product's weight, with its adapter if it has one."""
    return weight if adapter is None else adapter(weight)
