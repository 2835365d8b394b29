"""Cross-entropy fused with log-softmax, in nats.

loss = sum over valid targets of logsumexp(z) - z[target],   dz = (softmax(z) - onehot) * dloss.

A target equal to `ignore` is not counted. The sum and the number of valid targets are returned separately, so that all tokens of a step
weigh the same and the loss of a batch without targets is 0, not NaN.
"""

from typing import Any, NamedTuple

from minimoe.reference.arrays import Array, ArrayLayer
from minimoe.reference.linear import LinearKernels

IGNORE = -100


class HeadSaved(NamedTuple):
    """What the reference's linear_cross_entropy keeps for its backward."""

    x: Array
    weight: Array
    logits: Array
    targets: Array
    logsumexp: Array


class LossKernels(LinearKernels, ArrayLayer):
    def cross_entropy(self, logits: Array, targets: Array, ignore: int = IGNORE) -> tuple[Array, Array, Array]:
        """logits [N,V], targets [N] int32 -> sum 0-d, number of valid targets 0-d, logsumexp [N]"""
        xp = self.xp
        wide = self.wide(logits)
        lse = self.logsumexp(wide)
        valid = targets != ignore
        index = xp.where(valid, targets, xp.zeros_like(targets))
        chosen = xp.take_along_axis(wide, xp.astype(index, xp.int64)[:, None], axis=-1)[:, 0]
        loss = xp.where(valid, lse - chosen, xp.zeros_like(lse))
        return xp.sum(loss), xp.sum(xp.astype(valid, lse.dtype)), lse

    def cross_entropy_backward(self, dloss: Array, logits: Array, targets: Array, logsumexp: Array, ignore: int = IGNORE) -> Array:
        """dloss 0-d -> dlogits [N,V]"""
        xp = self.xp
        p = xp.exp(self.wide(logits) - logsumexp[:, None])
        p -= xp.astype(targets[:, None] == xp.arange(logits.shape[-1], dtype=targets.dtype), p.dtype)
        p *= (xp.astype(targets != ignore, p.dtype) * dloss)[:, None]
        return xp.astype(p, logits.dtype, copy=False)

    def linear_cross_entropy(self, x: Array, weight: Array, targets: Array, ignore: int = IGNORE) -> tuple[tuple[Array, Array], Any]:
        """cross_entropy(x W^T).   x [N,D], weight [V,D], targets [N] -> (sum, number of valid targets), saved"""
        logits = self.linear(x, weight)
        total, count, lse = self.cross_entropy(logits, targets, ignore)
        return (total, count), HeadSaved(x, weight, logits, targets, lse)

    def linear_cross_entropy_backward(
        self, dloss: Array, saved: Any, ignore: int = IGNORE, out: Array | None = None, accumulate: bool = False
    ) -> tuple[Array, Array]:
        """-> dx [N,D]; dweight [V,D], in `out` if given, added to it if `accumulate`"""
        dlogits = self.cross_entropy_backward(dloss, saved.logits, saved.targets, saved.logsumexp, ignore)
        return self.linear_dx(dlogits, saved.weight), self.linear_dw(dlogits, saved.x, out, accumulate)
