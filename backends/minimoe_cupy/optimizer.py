"""Optimizers, one launch over a flat buffer; the norm of gradients, two launches. The kernels are in kernels/optimizer.cu.

The learning rate, the clip, the step and the verdict are read on the device, so a recorded step follows its schedule. muon is products of
matrices: the reference.
"""

import math

import numpy as np

from minimoe.backend import Array
from minimoe_cupy.constants import constant
from minimoe_cupy.launch import CudaLaunch, by_width, ceil_div, computed, instance, instances, lanes, wide
from minimoe_cupy.loader import Source

BLOCK = 256
SUM_BLOCK, SUM_GRID = constant("optimizer.cu", "SUM_BLOCK"), 1024
ACCESSES = 4  # accesses per thread of a sum of squares, before there are more blocks
SQUARES = (*instances("sum_of_squares", [1, 4], ["float"]), *instances("sum_of_squares", [1, 8], ["bf16"]))
OPTIMIZER = Source("optimizer.cu", (*by_width("adamw"), *by_width("sgd"), *by_width("lion"), *SQUARES, "sum_partial"))


class CudaOptimizer(CudaLaunch):
    def sum_of_squares(self, x: Array) -> Array:
        if not computed(x):
            return super().sum_of_squares(x)
        (x,) = self._contiguous(x)
        count, v = math.prod(x.shape), lanes(0, x)
        blocks = min(SUM_GRID, max(1, ceil_div(count, SUM_BLOCK * v * ACCESSES)))
        partial, y = self.xp.empty(blocks, dtype=self.xp.float32), self.xp.empty((), dtype=self.xp.float32)
        self._launch(OPTIMIZER, instance("sum_of_squares", v, x.dtype), blocks, SUM_BLOCK, x, partial, count)
        self._launch(OPTIMIZER, "sum_partial", 1, SUM_BLOCK, partial, y, blocks)
        return y

    def adamw(
        self, inout_param: Array, inout_m: Array, inout_v: Array, grad: Array, *, lr: Array, step: Array, scale: Array, ok: Array,
        beta1: float, beta2: float, eps: float, weight_decay: float,
    ) -> None:  # fmt: skip
        buffers = inout_param, inout_m, inout_v, grad
        if not updatable(buffers, lr, scale) or step.dtype != np.int32:
            super().adamw(
                inout_param, inout_m, inout_v, grad, lr=lr, step=step, scale=scale, ok=ok, beta1=beta1, beta2=beta2, eps=eps,
                weight_decay=weight_decay,
            )  # fmt: skip
            return
        numbers = beta1, beta2, 1.0 - beta1, 1.0 - beta2, logarithm(beta1), logarithm(beta2), eps, weight_decay
        self._update("adamw", buffers, lr, step, scale, ok, *numbers)

    def sgd(
        self, inout_param: Array, inout_m: Array, grad: Array, *, lr: Array, scale: Array, ok: Array, momentum: float, weight_decay: float
    ) -> None:
        buffers = inout_param, inout_m, grad
        if not updatable(buffers, lr, scale):
            super().sgd(inout_param, inout_m, grad, lr=lr, scale=scale, ok=ok, momentum=momentum, weight_decay=weight_decay)
            return
        self._update("sgd", buffers, lr, scale, ok, momentum, weight_decay)

    def lion(
        self, inout_param: Array, inout_m: Array, grad: Array, *, lr: Array, scale: Array, ok: Array, beta1: float, beta2: float,
        weight_decay: float,
    ) -> None:  # fmt: skip
        buffers = inout_param, inout_m, grad
        if not updatable(buffers, lr, scale):
            super().lion(inout_param, inout_m, grad, lr=lr, scale=scale, ok=ok, beta1=beta1, beta2=beta2, weight_decay=weight_decay)
            return
        self._update("lion", buffers, lr, scale, ok, beta1, beta2, 1.0 - beta1, 1.0 - beta2, weight_decay)

    def _update(self, kernel: str, buffers: tuple[Array, ...], *rest: Array | float) -> None:
        *written, grad = buffers
        (grad,) = self._contiguous(grad)
        count, v = math.prod(grad.shape), lanes(0, *written, grad)
        self._launch(OPTIMIZER, instance(kernel, grad.dtype, v), ceil_div(count, v * BLOCK), BLOCK, *written, grad, *rest, count)


def updatable(buffers: tuple[Array, ...], lr: Array, scale: Array) -> bool:
    return computed(*buffers) and wide(lr, scale) and all(a.flags.c_contiguous for a in buffers[:-1])


def logarithm(x: float) -> float:
    """ln x; -inf at 0, so that 0^step is 0."""
    return math.log(x) if x > 0.0 else -math.inf
