"""Cross-entropy in one pass over the logits, and fused with the head's product: the launches of kernels/loss.cu.

The fused form overwrites the logits with softmax - onehot while a row is still in the cache: there is one [N,V] array, and backward is two
products, which may run more than once; dloss multiplies their narrow sides.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from minimoe.backend import Array
from minimoe.reference.loss import IGNORE
from minimoe_cupy.constants import constant
from minimoe_cupy.launch import CudaLaunch, by_width, ceil_div, computed, instance, instances, lanes, wide
from minimoe_cupy.loader import Source

WARP, MOST = constant("loss.cu", "WARP"), constant("loss.cu", "MOST")  # threads of a narrow row, of a wide row
BLOCK = 256  # threads of a block of narrow rows
ACCESSES = 4  # accesses per thread of a row, before the row gets more threads
FORWARD = (*instances("cross_entropy", [1, 4], ["float"]), *instances("cross_entropy", [1, 8], ["bf16"]))
LOSS = Source("loss.cu", (*FORWARD, *by_width("cross_entropy_backward"), *by_width("head_loss"), *by_width("scaled"), "total_loss"))


class SavedHead(NamedTuple):
    """What the fused form saves for backward."""

    x: Array  # [N,D]
    weight: Array  # [V,D]
    dlogits: Array  # [N,V], for a dloss of one


class CudaLoss(CudaLaunch):
    def cross_entropy(self, logits: Array, targets: Array, ignore: int = IGNORE) -> tuple[Array, Array, Array]:
        if not computed(logits) or not indices(targets):
            return super().cross_entropy(logits, targets, ignore)
        logits, targets = self._contiguous(logits, targets)
        n, width = logits.shape
        losses, logsumexp = (self.xp.empty(n, dtype=self.xp.float32) for _ in range(2))
        v = lanes(0, logits)
        name = instance("cross_entropy", v, logits.dtype)
        self._launch(LOSS, name, *row_launch(n, width, v), logits, targets, losses, logsumexp, ignore, n, width)
        return *self._total(losses, targets, ignore), logsumexp

    def cross_entropy_backward(self, dloss: Array, logits: Array, targets: Array, logsumexp: Array, ignore: int = IGNORE) -> Array:
        if not computed(logits) or not wide(dloss, logsumexp) or not indices(targets):
            return super().cross_entropy_backward(dloss, logits, targets, logsumexp, ignore)
        logits, targets, logsumexp = self._contiguous(logits, targets, logsumexp)
        dlogits = self.xp.empty(logits.shape, dtype=logits.dtype)
        n, width = logits.shape
        v = lanes(0, logits, dlogits)
        name = instance("cross_entropy_backward", logits.dtype, v)
        self._launch(LOSS, name, *row_launch(n, width, v), dloss, logits, targets, logsumexp, dlogits, ignore, n, width)
        return dlogits

    def linear_cross_entropy(self, x: Array, weight: Array, targets: Array, ignore: int = IGNORE) -> tuple[tuple[Array, Array], Any]:
        if not computed(x, weight) or not indices(targets):
            return super().linear_cross_entropy(x, weight, targets, ignore)
        (targets,) = self._contiguous(targets)
        inout_logits = self.linear(x, weight)
        n, width = inout_logits.shape
        losses = self.xp.empty(n, dtype=self.xp.float32)
        v = lanes(0, inout_logits)
        name = instance("head_loss", x.dtype, v)
        self._launch(LOSS, name, *row_launch(n, width, v), inout_logits, targets, losses, ignore, n, width)
        return self._total(losses, targets, ignore), SavedHead(x, weight, inout_logits)

    def linear_cross_entropy_backward(
        self, dloss: Array, saved: Any, ignore: int = IGNORE, out: Array | None = None, accumulate: bool = False
    ) -> tuple[Array, Array]:
        if not isinstance(saved, SavedHead):
            return super().linear_cross_entropy_backward(dloss, saved, ignore, out, accumulate)
        x, weight, dlogits = saved
        dloss = self.xp.asarray(dloss, dtype=self.xp.float32)
        dx = self.linear_dx(dlogits, weight)
        return self._scaled(dx, dloss, out=dx), self.linear_dw(dlogits, self._scaled(x, dloss), out, accumulate)

    def _total(self, losses: Array, targets: Array, ignore: int) -> tuple[Array, Array]:
        """Returns the sum of the losses and the number of valid targets, both 0-d."""
        total, count = (self.xp.empty((), dtype=self.xp.float32) for _ in range(2))
        self._launch(LOSS, "total_loss", 1, MOST, losses, targets, total, count, ignore, losses.shape[0])
        return total, count

    def _scaled(self, x: Array, factor: Array, out: Array | None = None) -> Array:
        """Returns x * factor, in `out` if given, which may be x. The factor is 0-d, float32 and on the device."""
        (x,) = self._contiguous(x)
        y = self.xp.empty(x.shape, dtype=x.dtype) if out is None else out
        count, v = math.prod(x.shape), lanes(0, x, y)
        self._launch(LOSS, instance("scaled", x.dtype, v), ceil_div(count, v * BLOCK), BLOCK, x, y, factor, count)
        return y


def indices(targets: Array) -> bool:
    return bool(targets.dtype == np.int32)


def row_launch(n: int, width: int, v: int) -> tuple[int, tuple[int, int]]:
    """Returns grid and block (threads per row, rows) for n rows: a warp for each narrow row, a block for each wide one."""
    wanted = ceil_div(width, v * ACCESSES)
    across = min(MOST, max(WARP, 1 << (wanted - 1).bit_length()))
    down = BLOCK // WARP if across == WARP else 1
    return ceil_div(n, down), (across, down)
