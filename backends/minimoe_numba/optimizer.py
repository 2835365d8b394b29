"""Optimizers that read and write each buffer once, and the sum of squares. Formulas: minimoe/reference/optimizer.py.

A sum over millions of numbers is taken in blocks, in float32 within a block and in float64 over blocks, in an order that depends only on
the size. The kernel reads numbers that change from step to step (learning rate, clipping, whether to skip) from an array, so that a step
can be recorded. Loops count from 0 over slices: LLVM makes no vector code if an index might be negative.
"""

import numpy as np

from minimoe.backend import Array
from minimoe_numba.arrays import singles, zeros
from minimoe_numba.creation import again_from, contiguous
from minimoe_numba.kernel import D1, F1, kernel
from minimoe_numba.maths import ONE, ZERO
from minimoe_numpy import NumpyBackend

ELEMENTS = 2**15  # per piece
BLOCK = 1024  # elements per float32 sum


@kernel
def adamw_elements(start: int, stop: int, w: F1, m: F1, v: F1, grad: F1, numbers: D1) -> None:
    """numbers: lr, scale, ok, step, beta1, beta2, eps, weight decay. Nothing changes if ok is 0."""
    lr, scale, step, beta1, beta2 = numbers[0], np.float32(numbers[1]), numbers[3], numbers[4], numbers[5]
    keep1, new1, keep2, new2 = np.float32(beta1), np.float32(1.0 - beta1), np.float32(beta2), np.float32(1.0 - beta2)
    rate, correct2 = np.float32(lr / (1.0 - beta1**step)), np.float32(1.0 / np.sqrt(1.0 - beta2**step))
    eps, shrink = np.float32(numbers[6]), np.float32(1.0 - lr * numbers[7])
    w, m, v, grad = w[start:stop], m[start:stop], v[start:stop], grad[start:stop]
    for i in range(stop - start if numbers[2] else 0):
        g = grad[i] * scale
        m[i] = m[i] * keep1 + g * new1
        v[i] = v[i] * keep2 + g * g * new2
        w[i] = w[i] * shrink - rate * (m[i] / (np.sqrt(v[i]) * correct2 + eps))


@kernel
def sgd_elements(start: int, stop: int, w: F1, m: F1, grad: F1, numbers: D1) -> None:
    """numbers: lr, scale, ok, momentum, weight decay"""
    rate, scale, momentum = np.float32(numbers[0]), np.float32(numbers[1]), np.float32(numbers[3])
    shrink = np.float32(1.0 - numbers[0] * numbers[4])
    w, m, grad = w[start:stop], m[start:stop], grad[start:stop]
    for i in range(stop - start if numbers[2] else 0):
        m[i] = m[i] * momentum + grad[i] * scale
        w[i] = w[i] * shrink - rate * m[i]


@kernel
def lion_elements(start: int, stop: int, w: F1, m: F1, grad: F1, numbers: D1) -> None:
    """numbers: lr, scale, ok, beta1, beta2, weight decay"""
    rate, scale, beta1, beta2 = np.float32(numbers[0]), np.float32(numbers[1]), np.float32(numbers[3]), np.float32(numbers[4])
    shrink = np.float32(1.0 - numbers[0] * numbers[5])
    w, m, grad = w[start:stop], m[start:stop], grad[start:stop]
    for i in range(stop - start if numbers[2] else 0):
        g = grad[i] * scale
        u = m[i] * beta1 + g * (ONE - beta1)
        sign = ONE if u > ZERO else (-ONE if u < ZERO else u)  # NaN stays
        w[i] = w[i] * shrink - rate * sign
        m[i] = m[i] * beta2 + g * (ONE - beta2)


@kernel
def squares(start: int, stop: int, x: F1, sums: D1) -> None:
    """Write the sum of squares of each piece of ELEMENTS to sums."""
    total = np.float64(0.0)
    for low in range(start, stop, BLOCK):
        block = x[low : min(low + BLOCK, stop)]
        part = ZERO
        for i in range(len(block)):
            part += block[i] * block[i]
        total += np.float64(part)
    sums[start // ELEMENTS] = total


def numbers_of(*values: Array | float) -> Array:
    """Return numbers and 0-d arrays in one float64 array, which a kernel reads."""
    numbers = again_from(np.array([value if isinstance(value, int | float) else 0.0 for value in values], np.float64))
    for i, value in enumerate(values):
        if not isinstance(value, int | float):
            numbers[i] = value
    return numbers


class FastOptimizer(NumpyBackend):
    def sum_of_squares(self, x: Array) -> Array:
        if not singles(x):
            return super().sum_of_squares(x)
        flat = contiguous(x).reshape(-1)
        sums = zeros(-(-flat.size // ELEMENTS), np.float64)
        squares(flat.size, ELEMENTS, flat, sums)
        return np.sum(sums).astype(np.float32)

    def adamw(
        self, inout_param: Array, inout_m: Array, inout_v: Array, grad: Array, *, lr: Array, step: Array, scale: Array, ok: Array,
        beta1: float, beta2: float, eps: float, weight_decay: float,
    ) -> None:  # fmt: skip
        if not singles(inout_param, inout_m, inout_v, grad):
            super().adamw(
                inout_param, inout_m, inout_v, grad, lr=lr, step=step, scale=scale, ok=ok, beta1=beta1, beta2=beta2, eps=eps,
                weight_decay=weight_decay,
            )  # fmt: skip
            return
        numbers = numbers_of(lr, scale, ok, step, beta1, beta2, eps, weight_decay)
        adamw_elements(grad.size, ELEMENTS, inout_param, inout_m, inout_v, grad, numbers)

    def sgd(
        self, inout_param: Array, inout_m: Array, grad: Array, *, lr: Array, scale: Array, ok: Array, momentum: float, weight_decay: float
    ) -> None:
        if not singles(inout_param, inout_m, grad):
            super().sgd(inout_param, inout_m, grad, lr=lr, scale=scale, ok=ok, momentum=momentum, weight_decay=weight_decay)
            return
        sgd_elements(grad.size, ELEMENTS, inout_param, inout_m, grad, numbers_of(lr, scale, ok, momentum, weight_decay))

    def lion(
        self, inout_param: Array, inout_m: Array, grad: Array, *, lr: Array, scale: Array, ok: Array, beta1: float, beta2: float,
        weight_decay: float,
    ) -> None:  # fmt: skip
        if not singles(inout_param, inout_m, grad):
            super().lion(
                inout_param, inout_m, grad, lr=lr, scale=scale, ok=ok, beta1=beta1, beta2=beta2, weight_decay=weight_decay
            )  # fmt: skip
            return
        lion_elements(grad.size, ELEMENTS, inout_param, inout_m, grad, numbers_of(lr, scale, ok, beta1, beta2, weight_decay))
