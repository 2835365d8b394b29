"""Optimizers over flat buffers, one launch each: every state is read once and written once. Formulas: minimoe/reference/optimizer.py.

What changes from step to step (lr, step, scale, ok) is read on the device, so a launch is the same every step and a graph can replay it.
"""

import math

from minimoe.backend import Array
from minimoe_numba_cuda.compiler import cuda, float32
from minimoe_numba_cuda.launch import BOOL, F32, I32, THREADS, CudaKernels, blocks_of, expect, singles
from minimoe_numba_cuda.warp import LANES, ONE, WARPS, ZERO, sum_over_block

BLOCK = LANES * WARPS
MOST_BLOCKS = 1024  # of the first launch of sum_of_squares; a block of the second then adds eight each


@cuda.jit
def sum_squares(x, partials):  # type: ignore[no-untyped-def]
    """partials[b] = sum of x^2 over every B-th block of 128.   flat [P] -> [B]   Grid: B, block 128. Bytes: P read."""
    total = ZERO
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        total += x[i] * x[i]
    total = sum_over_block(total)
    if cuda.threadIdx.x == 0:
        partials[cuda.blockIdx.x] = total


@cuda.jit
def add_all(partials, y):  # type: ignore[no-untyped-def]
    """y[0] = sum of the partials, in a fixed order.   [B] -> [1]   One block."""
    total = ZERO
    for i in range(cuda.threadIdx.x, partials.size, BLOCK):
        total += partials[i]
    total = sum_over_block(total)
    if cuda.threadIdx.x == 0:
        y[0] = total


@cuda.jit
def adamw(w, m, v, grad, lr, step, scale, ok, log_beta1, log_beta2, new1, new2, eps, decay):  # type: ignore[no-untyped-def]
    """A step of AdamW where ok[0].   flat [P] each   Grid: ceil(P / 128). Bytes: 4 P read, 3 P written.

    1 - beta^step is -expm1(step * log(beta)), which keeps its digits where beta is close to 1; new1, new2 are 1 - beta.
    """
    i = cuda.grid(1)
    if i >= w.size or not ok[0]:
        return
    t = float32(step[0])
    correct1, correct2 = -math.expm1(t * log_beta1), math.sqrt(-math.expm1(t * log_beta2))
    g = grad[i] * scale[0]
    first = m[i] * (ONE - new1) + g * new1
    second = v[i] * (ONE - new2) + g * g * new2
    m[i], v[i] = first, second
    update = first / (math.sqrt(second) / correct2 + eps)
    w[i] = w[i] * (ONE - lr[0] * decay) - update * (lr[0] / correct1)


@cuda.jit
def sgd(w, m, grad, lr, scale, ok, momentum, decay):  # type: ignore[no-untyped-def]
    """A step of SGD with momentum where ok[0].   flat [P] each   Grid: ceil(P / 128). Bytes: 3 P read, 2 P written."""
    i = cuda.grid(1)
    if i >= w.size or not ok[0]:
        return
    m[i] = m[i] * momentum + grad[i] * scale[0]
    w[i] = w[i] * (ONE - lr[0] * decay) - lr[0] * m[i]


@cuda.jit
def lion(w, m, grad, lr, scale, ok, beta1, beta2, decay):  # type: ignore[no-untyped-def]
    """A step of Lion where ok[0].   flat [P] each   Grid: ceil(P / 128). Bytes: 3 P read, 2 P written."""
    i = cuda.grid(1)
    if i >= w.size or not ok[0]:
        return
    g = grad[i] * scale[0]
    direction = beta1 * m[i] + (ONE - beta1) * g
    sign = direction if direction == ZERO or direction != direction else (ONE if direction > ZERO else -ONE)
    w[i] = w[i] * (ONE - lr[0] * decay) - lr[0] * sign
    m[i] = m[i] * beta2 + (ONE - beta2) * g


class CudaOptimizer(CudaKernels):
    def sum_of_squares(self, x: Array) -> Array:
        if not singles(x):
            return super().sum_of_squares(x)
        flat = self.xp.reshape(self.contiguous(x), (-1,))
        partials, y = self._empty(min(MOST_BLOCKS, max(1, blocks_of(flat.size, BLOCK)))), self._empty(1)
        self._launch(sum_squares, (partials.size,), (BLOCK,), flat, partials)
        self._launch(add_all, (1,), (BLOCK,), partials, y)
        return self.xp.reshape(y, ())

    def adamw(
        self, inout_param: Array, inout_m: Array, inout_v: Array, grad: Array, *, lr: Array, step: Array, scale: Array, ok: Array,
        beta1: float, beta2: float, eps: float, weight_decay: float,
    ) -> None:  # fmt: skip
        if not singles(inout_param, inout_m, inout_v, grad):
            return super().adamw(
                inout_param, inout_m, inout_v, grad, lr=lr, step=step, scale=scale, ok=ok, beta1=beta1, beta2=beta2, eps=eps,
                weight_decay=weight_decay,
            )  # fmt: skip
        options = (*map(log_of, (beta1, beta2)), 1.0 - beta1, 1.0 - beta2, float(eps), float(weight_decay))
        given = self._one(lr), self._one(step, I32), self._one(scale), self._one(ok, BOOL)
        self._update("adamw", adamw, {"inout_param": inout_param, "inout_m": inout_m, "inout_v": inout_v}, grad, *given, *options)
        return None

    def sgd(
        self, inout_param: Array, inout_m: Array, grad: Array, *, lr: Array, scale: Array, ok: Array, momentum: float, weight_decay: float
    ) -> None:
        if not singles(inout_param, inout_m, grad):
            return super().sgd(inout_param, inout_m, grad, lr=lr, scale=scale, ok=ok, momentum=momentum, weight_decay=weight_decay)
        given = self._one(lr), self._one(scale), self._one(ok, BOOL), float(momentum), float(weight_decay)
        self._update("sgd", sgd, {"inout_param": inout_param, "inout_m": inout_m}, grad, *given)
        return None

    def lion(
        self, inout_param: Array, inout_m: Array, grad: Array, *, lr: Array, scale: Array, ok: Array, beta1: float, beta2: float,
        weight_decay: float,
    ) -> None:  # fmt: skip
        if not singles(inout_param, inout_m, grad):
            return super().lion(
                inout_param, inout_m, grad, lr=lr, scale=scale, ok=ok, beta1=beta1, beta2=beta2, weight_decay=weight_decay
            )  # fmt: skip
        given = self._one(lr), self._one(scale), self._one(ok, BOOL), float(beta1), float(beta2), float(weight_decay)
        self._update("lion", lion, {"inout_param": inout_param, "inout_m": inout_m}, grad, *given)
        return None

    def _update(self, name: str, kernel: object, states: dict[str, Array], grad: Array, *options: object) -> None:
        """One launch over flat buffers; what is written in place cannot be a copy, so it must be contiguous."""
        shape = tuple(grad.shape)
        for what, state in states.items():
            expect(name, what, state, shape, F32)
        flat = (self.xp.reshape(a, (-1,)) for a in (*states.values(), self._read(name, "grad", grad, shape)))
        self._launch(kernel, (blocks_of(math.prod(shape)),), (THREADS,), *flat, *options)


def log_of(beta: float) -> float:
    """log(beta), which is -infinity for 0: then 1 - beta^step is 1."""
    return math.log(beta) if beta > 0.0 else -math.inf
