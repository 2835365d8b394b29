"""Activations in one pass, forward and backward, with a vectorised exp. Formulas: minimoe/reference/activation.py.

The experts' kernels call `activate` and `activate_backward` on rows that are still in the cache.
"""

import math

import numpy as np

from minimoe.backend import Array
from minimoe.reference.activation import CLIPPED_ALPHA, TANH_CUBE, TANH_SCALE
from minimoe_numba.arrays import as_rows, by_width, result, singles
from minimoe_numba.compiling import compiled
from minimoe_numba.creation import empty
from minimoe_numba.kernel import F2, kernel
from minimoe_numba.maths import HALF, ONE, ZERO, erf, exp, sigmoid, tanh
from minimoe_numpy import NumpyBackend

SWIGLU, GELU, GELU_TANH, RELU = range(4)
KINDS = {"swiglu": SWIGLU, "gelu": GELU, "gelu_tanh": GELU_TANH, "relu": RELU}
ALPHA, SCALE, CUBE = np.float32(CLIPPED_ALPHA), np.float32(TANH_SCALE), np.float32(TANH_CUBE)
ROOT_HALF, PHI_0 = np.float32(math.sqrt(0.5)), np.float32(1.0 / math.sqrt(2.0 * math.pi))
THREE = np.float32(3.0)


@compiled
def activate(gate, up, y, kind, limit):  # type: ignore[no-untyped-def]
    """Compute a row y of the hidden layer. Only swiglu uses `up`.   gate, up, y [H]"""
    if kind == SWIGLU and limit == ZERO:
        for d in range(len(y)):
            y[d] = gate[d] * sigmoid(gate[d]) * up[d]
    elif kind == SWIGLU:
        for d in range(len(y)):
            low = min(gate[d], limit)
            y[d] = low * sigmoid(ALPHA * low) * (min(max(up[d], -limit), limit) + ONE)
    elif kind == GELU:
        for d in range(len(y)):
            y[d] = HALF * gate[d] * (ONE + erf(gate[d] * ROOT_HALF))
    elif kind == GELU_TANH:
        for d in range(len(y)):
            v = gate[d]
            y[d] = HALF * v * (ONE + tanh(SCALE * v * (ONE + CUBE * v * v)))
    else:
        for d in range(len(y)):
            y[d] = max(gate[d], ZERO)


@compiled
def activate_backward(dy, gate, up, weight, hidden, dgate, dup, kind, limit):  # type: ignore[no-untyped-def]
    """Compute hidden = weight * activation and the gradients times weight of a row, in one pass.   -> <activation, dy>

    All rows are [H]. They are arrays of their own because LLVM makes no vector code of loops over two halves of one array.
    """
    total = ZERO
    if kind == SWIGLU and limit == ZERO:
        for d in range(len(dy)):
            s = sigmoid(gate[d])
            silu = gate[d] * s
            h, g = silu * up[d], dy[d]
            total += h * g
            hidden[d] = weight * h
            g *= weight
            dgate[d] = g * up[d] * (s + silu * (ONE - s))
            dup[d] = g * silu
    elif kind == SWIGLU:
        for d in range(len(dy)):
            low, high = min(gate[d], limit), min(max(up[d], -limit), limit) + ONE
            s = sigmoid(ALPHA * low)
            silu = low * s
            h, g = silu * high, dy[d]
            total += h * g
            hidden[d] = weight * h
            g *= weight
            dgate[d] = g * high * (s + ALPHA * silu * (ONE - s)) if gate[d] <= limit else ZERO
            dup[d] = g * silu if abs(up[d]) <= limit else ZERO
    elif kind == GELU:
        for d in range(len(dy)):
            v, g = gate[d], dy[d]
            share = HALF * (ONE + erf(v * ROOT_HALF))
            total += v * share * g
            hidden[d] = weight * v * share
            dgate[d] = weight * g * (share + v * PHI_0 * exp(-HALF * v * v))
    elif kind == GELU_TANH:
        for d in range(len(dy)):
            v, g = gate[d], dy[d]
            t = tanh(SCALE * v * (ONE + CUBE * v * v))
            h = HALF * v * (ONE + t)
            total += h * g
            hidden[d] = weight * h
            dgate[d] = weight * g * HALF * (ONE + t + v * (ONE - t * t) * SCALE * (ONE + THREE * CUBE * v * v))
    else:
        for d in range(len(dy)):
            h, g = max(gate[d], ZERO), dy[d]
            total += h * g
            hidden[d] = weight * h
            dgate[d] = weight * g if gate[d] > ZERO else ZERO
    return total


@kernel
def activation(start: int, stop: int, x: F2, kind: int, limit: float, y: F2) -> None:
    width = y.shape[1]
    for r in range(start, stop):
        activate(x[r, :width], x[r, x.shape[1] - width :], y[r], kind, limit)


@kernel
def activation_backward(start: int, stop: int, dy: F2, x: F2, kind: int, limit: float, dx: F2) -> None:
    width, other = dy.shape[1], x.shape[1] - dy.shape[1]
    hidden = np.empty(width, np.float32)
    for r in range(start, stop):
        activate_backward(dy[r], x[r, :width], x[r, other:], ONE, hidden, dx[r, :width], dx[r, other:], kind, limit)


class FastActivation(NumpyBackend):
    def swiglu(self, gate_up: Array, limit: float = 0.0, out: Array | None = None) -> Array:
        if not singles(gate_up):
            return super().swiglu(gate_up, limit, out)
        return self._activation(gate_up, (*gate_up.shape[:-1], gate_up.shape[-1] // 2), SWIGLU, limit, out)

    def swiglu_backward(self, dy: Array, gate_up: Array, limit: float = 0.0) -> Array:
        if not singles(dy, gate_up):
            return super().swiglu_backward(dy, gate_up, limit)
        return self._activation_backward(dy, gate_up, SWIGLU, limit)

    def gelu(self, x: Array, tanh: bool = False, out: Array | None = None) -> Array:
        return self._activation(x, x.shape, GELU_TANH if tanh else GELU, 0.0, out) if singles(x) else super().gelu(x, tanh, out)

    def gelu_backward(self, dy: Array, x: Array, tanh: bool = False) -> Array:
        kind = GELU_TANH if tanh else GELU
        return self._activation_backward(dy, x, kind, 0.0) if singles(dy, x) else super().gelu_backward(dy, x, tanh)

    def relu(self, x: Array, out: Array | None = None) -> Array:
        return self._activation(x, x.shape, RELU, 0.0, out) if singles(x) else super().relu(x, out)

    def relu_backward(self, dy: Array, x: Array) -> Array:
        return self._activation_backward(dy, x, RELU, 0.0) if singles(dy, x) else super().relu_backward(dy, x)

    def _activation(self, x: Array, shape: tuple[int, ...], kind: int, limit: float, out: Array | None) -> Array:
        rows, y = as_rows(x), result(out, shape)
        activation(len(rows), by_width(rows.shape[1]), rows, kind, limit, as_rows(y))
        return y if y is out else self.store(y, out)

    def _activation_backward(self, dy: Array, x: Array, kind: int, limit: float) -> Array:
        rows, dx = as_rows(x), empty(x.shape)
        activation_backward(len(rows), by_width(rows.shape[1]), as_rows(dy), rows, kind, limit, as_rows(dx))
        return dx
