"""Cross-entropy, alone and fused with the matrix product that computes the logits."""

from __future__ import annotations

from minimoe.backend import Array
from minimoe.engine.buffers import Out
from minimoe.engine.tensor import Tensor
from minimoe.reference.loss import IGNORE


def cross_entropy(logits: Tensor, targets: Array, ignore: int = IGNORE) -> tuple[Tensor, Array]:
    """logits [N,V], targets [N] int32 -> the loss in nats summed over valid targets, and their number (0-d array)"""
    b, la = logits.backend, logits.data
    total, count, lse = b.cross_entropy(la, targets, ignore)
    y = Tensor.from_op(total, (logits,), lambda dy: b.cross_entropy_backward(dy, la, targets, lse, ignore))
    return y, count


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Array, ignore: int = IGNORE) -> tuple[Tensor, Array]:
    """cross_entropy(x W^T), fused.   x [N,D], weight [V,D], targets [N] -> the sum in nats, the number of valid targets (0-d array)"""
    b = x.backend
    (total, count), saved = b.linear_cross_entropy(x.data, weight.data, targets, ignore)

    def backward(dy: Array, outs: list[Out]) -> tuple[Array, Array]:
        return b.linear_cross_entropy_backward(dy, saved, ignore, **outs[1])

    return Tensor.from_op(total, (x, weight), backward, outs=True), count
