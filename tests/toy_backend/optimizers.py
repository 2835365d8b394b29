"""Optimizers that update where the arrays are. The host has `ok` at once, so that a skipped step simply returns."""

import math

import numpy as np

from toy_backend.parts import Array, Scratch


class Optimizers(Scratch):
    def sum_of_squares(self, x: Array) -> Array:
        square = self._scratch("square", x.shape, x.dtype)
        np.multiply(x, x, out=square)
        return square.sum()

    def adamw(
        self, inout_param: Array, inout_m: Array, inout_v: Array, grad: Array, *, lr: Array, step: Array, scale: Array, ok: Array,
        beta1: float, beta2: float, eps: float, weight_decay: float,
    ) -> None:  # fmt: skip
        if not ok:
            return
        g = self._clipped(grad, scale)
        inout_m += (1.0 - beta1) * (g - inout_m)
        inout_v += (1.0 - beta2) * (g * g - inout_v)
        correct1, correct2 = 1.0 - beta1 ** int(step), 1.0 - beta2 ** int(step)
        inout_param -= lr * weight_decay * inout_param
        inout_param -= lr * (inout_m / correct1) / (np.sqrt(inout_v / correct2) + eps)

    def sgd(
        self, inout_param: Array, inout_m: Array, grad: Array, *, lr: Array, scale: Array, ok: Array, momentum: float, weight_decay: float
    ) -> None:
        if not ok:
            return
        inout_m *= momentum
        inout_m += self._clipped(grad, scale)
        inout_param -= lr * weight_decay * inout_param
        inout_param -= lr * inout_m

    def lion(
        self, inout_param: Array, inout_m: Array, grad: Array, *, lr: Array, scale: Array, ok: Array, beta1: float, beta2: float,
        weight_decay: float,
    ) -> None:  # fmt: skip
        if not ok:
            return
        g = self._clipped(grad, scale)
        inout_param -= lr * weight_decay * inout_param
        inout_param -= lr * np.sign(beta1 * inout_m + (1.0 - beta1) * g)
        inout_m += (1.0 - beta2) * (g - inout_m)

    def muon(
        self, inout_param: Array, inout_m: Array, grad: Array, *, lr: Array, scale: Array, ok: Array, momentum: float, weight_decay: float
    ) -> None:
        if not ok:
            return
        g = self._clipped(grad, scale)
        inout_m *= momentum
        inout_m += g
        rows, columns = grad.shape[-2:]
        size = 0.2 * math.sqrt(max(rows, columns))  # of the update, as AdamW's
        for index in np.ndindex(grad.shape[:-2]):
            update = orthogonal(g[index] + momentum * inout_m[index])
            inout_param[index] -= lr * weight_decay * inout_param[index]
            inout_param[index] -= lr * size * update

    def _clipped(self, grad: Array, scale: Array) -> Array:
        """grad * scale, in scratch memory"""
        g = self._scratch("clipped", grad.shape, grad.dtype)
        np.multiply(grad, scale, out=g)
        return g


def orthogonal(x: Array) -> Array:
    """Return a matrix with x's singular vectors and singular values near 1, by five Newton-Schulz steps.   [O,I] -> [O,I]"""
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.T).T
    y = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        gram = y @ y.T  # [O,O]
        y = 3.4445 * y - 4.7750 * (gram @ y) + 2.0315 * (gram @ (gram @ y))
    return y
