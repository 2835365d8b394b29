"""Optimizers that read and write each buffer once, and the sum of squares. Formulas: minimoe/reference/optimizer.py.

A sum over millions of numbers is taken in blocks, float32 within one and float64 over them, in an order that the size alone fixes.
Loops count from 0 over slices: an index that might be negative, as far as LLVM knows, keeps a loop from becoming vector code.
"""

import math

import numpy as np

from minimoe.backend import Array
from minimoe_numba.arrays import singles
from minimoe_numba.kernel import D1, F1, kernel
from minimoe_numba.maths import ONE, ZERO
from minimoe_numpy import NumpyBackend

ELEMENTS = 2**15  # of a piece
BLOCK = 1024  # elements of a float32 sum


@kernel
def adamw_elements(
    start: int, stop: int, w: F1, m: F1, v: F1, grad: F1, scale: float, beta1: float, new1: float, beta2: float, new2: float, rate: float,
    correct2: float, eps: float, shrink: float,
) -> None:  # fmt: skip
    w, m, v, grad = w[start:stop], m[start:stop], v[start:stop], grad[start:stop]
    for i in range(stop - start):
        g = grad[i] * scale
        m[i] = m[i] * beta1 + g * new1
        v[i] = v[i] * beta2 + g * g * new2
        w[i] = w[i] * shrink - rate * (m[i] / (np.sqrt(v[i]) * correct2 + eps))


@kernel
def sgd_elements(start: int, stop: int, w: F1, m: F1, grad: F1, scale: float, momentum: float, rate: float, shrink: float) -> None:
    w, m, grad = w[start:stop], m[start:stop], grad[start:stop]
    for i in range(stop - start):
        m[i] = m[i] * momentum + grad[i] * scale
        w[i] = w[i] * shrink - rate * m[i]


@kernel
def lion_elements(
    start: int, stop: int, w: F1, m: F1, grad: F1, scale: float, beta1: float, beta2: float, rate: float, shrink: float
) -> None:
    w, m, grad = w[start:stop], m[start:stop], grad[start:stop]
    for i in range(stop - start):
        g = grad[i] * scale
        u = m[i] * beta1 + g * (ONE - beta1)
        sign = ONE if u > ZERO else (-ONE if u < ZERO else u)  # NaN stays
        w[i] = w[i] * shrink - rate * sign
        m[i] = m[i] * beta2 + g * (ONE - beta2)


@kernel
def squares(start: int, stop: int, x: F1, sums: D1) -> None:
    """A sum for each piece of ELEMENTS."""
    total = np.float64(0.0)
    for low in range(start, stop, BLOCK):
        block = x[low : min(low + BLOCK, stop)]
        part = ZERO
        for i in range(len(block)):
            part += block[i] * block[i]
        total += np.float64(part)
    sums[start // ELEMENTS] = total


class FastOptimizer(NumpyBackend):
    def sum_of_squares(self, x: Array) -> Array:
        if not singles(x):
            return super().sum_of_squares(x)
        flat = np.ascontiguousarray(x).reshape(-1)
        sums = np.zeros(-(-flat.size // ELEMENTS), np.float64)
        squares(flat.size, ELEMENTS, flat, sums)
        return np.asarray(np.sum(sums), np.float32)

    def adamw(
        self, inout_param: Array, inout_m: Array, inout_v: Array, grad: Array, *, lr: Array, step: Array, scale: Array, ok: Array,
        beta1: float, beta2: float, eps: float, weight_decay: float,
    ) -> None:  # fmt: skip
        if not singles(inout_param, inout_m, inout_v, grad):
            super().adamw(
                inout_param, inout_m, inout_v, grad, lr=lr, step=step, scale=scale, ok=ok, beta1=beta1, beta2=beta2, eps=eps,
                weight_decay=weight_decay,
            )  # fmt: skip
        elif ok:
            rate, t = float(lr), int(step)
            adamw_elements(
                grad.size, ELEMENTS, inout_param, inout_m, inout_v, grad, float(scale), beta1, 1.0 - beta1, beta2, 1.0 - beta2,
                rate / (1.0 - beta1**t), 1.0 / math.sqrt(1.0 - beta2**t), eps, 1.0 - rate * weight_decay,
            )  # fmt: skip

    def sgd(
        self, inout_param: Array, inout_m: Array, grad: Array, *, lr: Array, scale: Array, ok: Array, momentum: float, weight_decay: float
    ) -> None:
        if not singles(inout_param, inout_m, grad):
            super().sgd(inout_param, inout_m, grad, lr=lr, scale=scale, ok=ok, momentum=momentum, weight_decay=weight_decay)
        elif ok:
            rate = float(lr)
            sgd_elements(grad.size, ELEMENTS, inout_param, inout_m, grad, float(scale), momentum, rate, 1.0 - rate * weight_decay)

    def lion(
        self, inout_param: Array, inout_m: Array, grad: Array, *, lr: Array, scale: Array, ok: Array, beta1: float, beta2: float,
        weight_decay: float,
    ) -> None:  # fmt: skip
        if not singles(inout_param, inout_m, grad):
            super().lion(
                inout_param, inout_m, grad, lr=lr, scale=scale, ok=ok, beta1=beta1, beta2=beta2, weight_decay=weight_decay
            )  # fmt: skip
        elif ok:
            rate = float(lr)
            lion_elements(grad.size, ELEMENTS, inout_param, inout_m, grad, float(scale), beta1, beta2, rate, 1.0 - rate * weight_decay)
