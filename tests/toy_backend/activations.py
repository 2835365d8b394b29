"""Activations, one expression each; the gradients are written as derivatives that multiply dy."""

import math

import numpy as np

from toy_backend.parts import Array, Scratch, logistic, put

ALPHA = 1.702  # of gpt-oss's clipped form
ROOT = math.sqrt(2.0 / math.pi)


class Activations(Scratch):
    def swiglu(self, gate_up: Array, limit: float = 0.0, out: Array | None = None) -> Array:
        h = gate_up.shape[-1] // 2
        gate, up = gate_up[..., :h], gate_up[..., h:]
        if limit > 0.0:
            gate, up = np.minimum(gate, limit), np.maximum(np.minimum(up, limit), -limit)
            return put(gate * logistic(ALPHA * gate) * (up + 1.0), out)
        return put(gate * logistic(gate) * up, out)

    def swiglu_backward(self, dy: Array, gate_up: Array, limit: float = 0.0) -> Array:
        h = gate_up.shape[-1] // 2
        gate, up = gate_up[..., :h], gate_up[..., h:]
        dx = np.empty_like(gate_up)
        if limit > 0.0:
            inside, between = gate <= limit, (up <= limit) & (up >= -limit)
            gate, up = np.minimum(gate, limit), np.maximum(np.minimum(up, limit), -limit)
            s = logistic(ALPHA * gate)
            slope = s + ALPHA * gate * s * (1.0 - s)  # of gate * s
            dx[..., :h] = np.where(inside, dy * slope * (up + 1.0), 0.0)
            dx[..., h:] = np.where(between, dy * gate * s, 0.0)
        else:
            s = logistic(gate)
            dx[..., :h] = dy * up * (s + gate * s * (1.0 - s))
            dx[..., h:] = dy * gate * s
        return dx

    def gelu(self, x: Array, tanh: bool = False, out: Array | None = None) -> Array:
        if tanh:
            return put(x * logistic(2.0 * ROOT * (x + 0.044715 * x * x * x)), out)  # (1 + tanh(u)) / 2 is the logistic function of 2u
        return put(x * 0.5 * (1.0 + self.erf(x / math.sqrt(2.0))), out)

    def gelu_backward(self, dy: Array, x: Array, tanh: bool = False) -> Array:
        if tanh:
            s = logistic(2.0 * ROOT * (x + 0.044715 * x * x * x))
            return dy * (s + x * s * (1.0 - s) * 2.0 * ROOT * (1.0 + 3.0 * 0.044715 * x * x))
        density = np.exp(-x * x / 2.0) / math.sqrt(2.0 * math.pi)
        return dy * (0.5 + 0.5 * self.erf(x / math.sqrt(2.0)) + x * density)

    def relu(self, x: Array, out: Array | None = None) -> Array:
        return put(np.maximum(x, 0.0), out)

    def relu_backward(self, dy: Array, x: Array) -> Array:
        return np.where(x > 0.0, dy, 0.0)
