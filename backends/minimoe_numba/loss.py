"""Cross-entropy in one pass over a row; fused with the head's product, in pieces of rows whose logits are still in the cache.

The fused form overwrites the logits with softmax - onehot, so its backward is two products. Formulas: minimoe/reference/loss.py.
"""

from typing import Any, NamedTuple

import numpy as np

from minimoe.backend import Array
from minimoe.reference.loss import IGNORE
from minimoe_numba.arrays import as_rows, by_width, singles
from minimoe_numba.compiling import compiled, inlined
from minimoe_numba.creation import contiguous, empty
from minimoe_numba.kernel import F1, F2, I1, kernel
from minimoe_numba.linear import multiply, shared_out
from minimoe_numba.machine import machine
from minimoe_numba.maths import INFINITY, ONE, ZERO, exp, largest, softmax_into
from minimoe_numba.native import PLAIN, TRANSPOSED, call_sgemm
from minimoe_numpy import NumpyBackend

HEAD_ROWS = 128  # at least, per piece of the fused form: each piece reads the head's whole weight


class Saved(NamedTuple):
    """The fused form saves this for its backward."""

    x: Array  # [N,D]
    weight: Array  # [V,D]
    dlogits: Array  # [N,V]


@compiled
def logsumexp_of(z):  # type: ignore[no-untyped-def]
    """log(sum(exp(z))); -inf for a row of -inf alone"""
    top = largest(z)
    top = ZERO if top == -INFINITY else top
    total = ZERO
    for j in range(len(z)):
        total += exp(z[j] - top)
    return top + np.log(total)


@compiled
def gradient_row(z, lse, target, factor, dz):  # type: ignore[no-untyped-def]
    """factor * (softmax(z) - onehot(target))"""
    for j in range(len(z)):
        dz[j] = factor * exp(z[j] - lse)
    if 0 <= target < len(z):
        dz[target] -= factor


@inlined
def score_of(z, target):  # type: ignore[no-untyped-def]
    """Return z[target], or NaN if the target is out of range."""
    return z[target] if 0 <= target < len(z) else np.float32(np.nan)


@kernel
def losses(start: int, stop: int, logits: F2, targets: I1, ignore: int, loss: F1, logsumexp: F1) -> None:
    for n in range(start, stop):
        lse = logsumexp_of(logits[n])
        logsumexp[n] = lse
        loss[n] = lse - score_of(logits[n], targets[n]) if targets[n] != ignore else ZERO


@kernel
def loss_gradients(start: int, stop: int, logits: F2, targets: I1, ignore: int, logsumexp: F1, dloss: F1, dlogits: F2) -> None:
    factor = dloss[0]
    for n in range(start, stop):
        if targets[n] == ignore:
            dlogits[n] = ZERO * factor
        else:
            gradient_row(logits[n], logsumexp[n], targets[n], factor, dlogits[n])


@kernel
def head_losses(start: int, stop: int, sgemm: int, x: F2, weight: F2, targets: I1, ignore: int, loss: F1, dlogits: F2) -> None:
    width, vocabulary = x.shape[1], weight.shape[0]
    address = dlogits.ctypes.data + 4 * start * vocabulary
    x_address = x.ctypes.data + 4 * start * width
    call_sgemm(
        sgemm, PLAIN, TRANSPOSED, stop - start, vocabulary, width, x_address, width, weight.ctypes.data, width, ZERO, address, vocabulary
    )
    for n in range(start, stop):
        z = dlogits[n]
        if targets[n] == ignore:
            loss[n] = ZERO
            z[:] = ZERO
        else:
            lse = logsumexp_of(z)
            loss[n] = lse - score_of(z, targets[n])
            gradient_row(z, lse, targets[n], ONE, z)


@kernel
def logsumexp_rows(start: int, stop: int, z: F2, y: F1) -> None:
    for n in range(start, stop):
        y[n] = logsumexp_of(z[n])


@kernel
def softmax_rows(start: int, stop: int, z: F2, p: F2) -> None:
    for n in range(start, stop):
        softmax_into(z[n], p[n])


class FastLoss(NumpyBackend):
    def logsumexp(self, x: Array) -> Array:
        if not singles(x) or not x.size:
            return super().logsumexp(x)
        rows, y = as_rows(x), empty(x.shape[:-1])
        logsumexp_rows(len(rows), by_width(rows.shape[1]), rows, y.reshape(-1))
        return y

    def softmax(self, x: Array) -> Array:
        if not singles(x) or not x.size:
            return super().softmax(x)
        rows, p = as_rows(x), empty(x.shape)
        softmax_rows(len(rows), by_width(rows.shape[1]), rows, as_rows(p))
        return p

    def cross_entropy(self, logits: Array, targets: Array, ignore: int = IGNORE) -> tuple[Array, Array, Array]:
        if not singles(logits) or not logits.size:
            return super().cross_entropy(logits, targets, ignore)
        n, vocabulary = logits.shape
        loss, logsumexp = empty(n), empty(n)
        losses(n, by_width(vocabulary), as_rows(logits), contiguous(targets), ignore, loss, logsumexp)
        return np.sum(loss), counted(targets, ignore), logsumexp

    def cross_entropy_backward(self, dloss: Array, logits: Array, targets: Array, logsumexp: Array, ignore: int = IGNORE) -> Array:
        if not singles(logits, logsumexp) or not logits.size:
            return super().cross_entropy_backward(dloss, logits, targets, logsumexp, ignore)
        n, vocabulary = logits.shape
        dlogits = empty((n, vocabulary))
        lse = contiguous(logsumexp)
        one = dloss.astype(np.float32).reshape(1)
        loss_gradients(n, by_width(vocabulary), as_rows(logits), contiguous(targets), ignore, lse, one, dlogits)
        return dlogits

    def linear_cross_entropy(self, x: Array, weight: Array, targets: Array, ignore: int = IGNORE) -> tuple[tuple[Array, Array], Any]:
        blas = machine().blas
        if blas is None or not singles(x, weight) or not (x.size and weight.size):
            return super().linear_cross_entropy(x, weight, targets, ignore)
        x, weight = as_rows(x), as_rows(weight)
        loss, dlogits = empty(len(x)), empty((len(x), len(weight)))
        grain = max(HEAD_ROWS, shared_out(len(x)))
        head_losses(len(x), grain, blas.sgemm, x, weight, contiguous(targets), ignore, loss, dlogits)
        return (np.sum(loss), counted(targets, ignore)), Saved(x, weight, dlogits)

    def linear_cross_entropy_backward(
        self, dloss: Array, saved: Any, ignore: int = IGNORE, out: Array | None = None, accumulate: bool = False
    ) -> tuple[Array, Array]:
        if not isinstance(saved, Saved):
            return super().linear_cross_entropy_backward(dloss, saved, ignore, out, accumulate)
        x, weight, dlogits = saved
        dx = empty(x.shape)
        multiply(dlogits, weight, dx)
        dx *= dloss
        return dx, self.linear_dw(dlogits, x * dloss, out, accumulate)


def counted(targets: Array, ignore: int) -> Array:
    """Return the number of targets that count, as a 0-d float32."""
    return np.sum(targets != ignore, dtype=np.float32)
