"""Cross-entropy. With the product before it, some rows of logits at a time are made, in scratch memory, and both gradients with them.

The fused kernel saves dx and dweight for a dloss of one, so that its backward only scales them (as Liger's does).
"""

from typing import Any

import numpy as np

from toy_backend.parts import Array, Scratch, put

ROWS = 16  # of logits at a time


class Losses(Scratch):
    def cross_entropy(self, logits: Array, targets: Array, ignore: int = -100) -> tuple[Array, Array, Array]:
        logsumexp = log_of_sum(logits)  # [N]
        counted = np.flatnonzero(targets != ignore)
        loss = logsumexp[counted] - logits[counted, targets[counted]]
        return loss.sum(), np.array(len(counted), dtype=logits.dtype), logsumexp

    def cross_entropy_backward(self, dloss: Array, logits: Array, targets: Array, logsumexp: Array, ignore: int = -100) -> Array:
        dlogits = np.exp(logits - logsumexp[:, None])
        counted = targets != ignore
        dlogits[counted, targets[counted]] -= 1.0
        dlogits *= dloss
        dlogits[~counted] = 0.0
        return dlogits

    def linear_cross_entropy(self, x: Array, weight: Array, targets: Array, ignore: int = -100) -> tuple[tuple[Array, Array], Any]:
        total, count = np.zeros((), dtype=x.dtype), np.zeros((), dtype=x.dtype)
        dx, dweight = np.empty_like(x), np.zeros_like(weight)
        one = np.ones((), dtype=x.dtype)
        for start in range(0, len(x), ROWS):
            rows = slice(start, start + ROWS)
            logits = self._scratch("logits", (len(x[rows]), len(weight)), x.dtype)
            np.matmul(x[rows], weight.T, out=logits)
            some, counted, logsumexp = self.cross_entropy(logits, targets[rows], ignore)
            total += some
            count += counted
            dlogits = self.cross_entropy_backward(one, logits, targets[rows], logsumexp, ignore)
            dx[rows] = dlogits @ weight
            dweight += dlogits.T @ x[rows]
        return (total, count), (dx, dweight)

    def linear_cross_entropy_backward(
        self, dloss: Array, saved: Any, ignore: int = -100, out: Array | None = None, accumulate: bool = False
    ) -> tuple[Array, Array]:
        dx, dweight = saved
        return dx * dloss, put(dweight * dloss, out, accumulate)


def log_of_sum(logits: Array) -> Array:
    """ln(sum(e^z)) of each row, -inf for a row of -inf.   [N,V] -> [N]"""
    top = logits.max(axis=1)
    top[top == -np.inf] = 0.0
    return np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
