"""Experts one after the other: a matrix product for the rows of each. The composites save activations' inputs, and activate again.

A dense feed-forward is one expert that has all rows; so `ffn` and `expert_ffn` share their two halves.
"""

from typing import Any

import numpy as np

from minimoe.reference.expert import ExpertWeights
from minimoe.reference.routing import Plan
from toy_backend.activations import Activations
from toy_backend.parts import Array, as_rows, put
from toy_backend.routes import Routes


class Experts(Routes, Activations):
    def grouped_matmul(self, x: Array, weight: Array, offsets: Array, transpose: bool = False, out: Array | None = None) -> Array:
        width = weight.shape[2] if transpose else weight.shape[1]
        y = np.empty((len(x), width), dtype=x.dtype) if out is None else out
        for e in range(len(weight)):
            rows = slice(offsets[e], offsets[e + 1])
            y[rows] = x[rows] @ (weight[e] if transpose else weight[e].T)
        y[offsets[-1] :] = 0.0
        return y

    def grouped_matmul_dw(self, dy: Array, x: Array, offsets: Array, out: Array | None = None, accumulate: bool = False) -> Array:
        experts = len(offsets) - 1
        dw = np.zeros((experts, dy.shape[1], x.shape[1]), dtype=x.dtype) if out is None else out
        if not accumulate:
            dw[...] = 0.0
        for e in range(experts):
            rows = slice(offsets[e], offsets[e + 1])
            dw[e] += dy[rows].T @ x[rows]
        return dw

    def grouped_bias(self, bias: Array, offsets: Array, rows: int) -> Array:
        y = np.zeros((rows, bias.shape[1]), dtype=bias.dtype)
        y[: offsets[-1]] = np.repeat(bias, np.diff(offsets), axis=0)
        return y

    def grouped_bias_backward(self, dy: Array, offsets: Array) -> Array:
        db = np.zeros((len(offsets) - 1, dy.shape[1]), dtype=dy.dtype)
        for e in range(len(db)):
            db[e] = dy[offsets[e] : offsets[e + 1]].sum(axis=0)
        return db

    # ---- composites --------------------------------------------------------------------------------------------------------------

    def ffn(self, x: Array, weights: ExpertWeights, activation: str, limit: float = 0.0) -> tuple[Array, Any]:
        rows = as_rows(x)
        offsets = np.array([0, len(rows)], dtype=np.int32)
        y, before = self._forward(rows, stacked(weights), offsets, activation, limit)
        return y.reshape(x.shape), (x, weights, before)

    def ffn_backward(
        self, dy: Array, saved: Any, activation: str, limit: float = 0.0, out: ExpertWeights | None = None, accumulate: bool = False
    ) -> tuple[Array, ExpertWeights]:
        x, weights, before = saved
        rows = as_rows(x)
        offsets = np.array([0, len(rows)], dtype=np.int32)
        dx, grads = self._backward(as_rows(dy), rows, stacked(weights), offsets, before, activation, limit)
        single = [None if grad is None else grad[0] for grad in grads]
        return dx.reshape(x.shape), written(ExpertWeights(*single), out, accumulate)

    def expert_ffn(self, rows: Array, weights: ExpertWeights, offsets: Array, activation: str, limit: float = 0.0) -> tuple[Array, Any]:
        y, before = self._forward(rows, weights, offsets, activation, limit)
        return y, (rows, weights, offsets, before)

    def expert_ffn_backward(
        self, dy: Array, saved: Any, activation: str, limit: float = 0.0, out: ExpertWeights | None = None, accumulate: bool = False
    ) -> tuple[Array, ExpertWeights]:
        rows, weights, offsets, before = saved
        drows, grads = self._backward(dy, rows, weights, offsets, before, activation, limit)
        return drows, written(grads, out, accumulate)

    def moe_ffn(
        self, x: Array, gate_weights: Array, plan: Plan, weights: ExpertWeights, activation: str, limit: float = 0.0
    ) -> tuple[Array, Any]:
        used = plan.offsets[-1]
        rows = x[plan.order[:used] // plan.inverse.shape[1]]  # [used,D]
        y_rows, before = self._forward(rows, weights, plan.offsets, activation, limit)
        y = np.zeros_like(x)
        for j in range(plan.inverse.shape[1]):
            has = plan.inverse[:, j] >= 0
            y[has] += gate_weights[has, j, None] * y_rows[plan.inverse[has, j]]
        return y, (rows, y_rows, gate_weights, plan, weights, before)

    def moe_ffn_backward(
        self, dy: Array, saved: Any, activation: str, limit: float = 0.0, out: ExpertWeights | None = None, accumulate: bool = False
    ) -> tuple[Array, Array, ExpertWeights]:
        rows, y_rows, gate_weights, plan, weights, before = saved
        pairs = plan.order[: len(rows)]  # n * W + j of each used row
        dy_rows = dy[pairs // gate_weights.shape[1]]
        dgate_weights = np.zeros_like(gate_weights)
        dgate_weights.reshape(-1)[pairs] = np.sum(dy_rows * y_rows, axis=1)
        dy_rows *= gate_weights.reshape(-1)[pairs, None]
        drows, grads = self._backward(dy_rows, rows, weights, plan.offsets, before, activation, limit)
        dx = np.zeros_like(dy)
        np.add.at(dx, pairs // gate_weights.shape[1], drows)
        return dx, dgate_weights, written(grads, out, accumulate)

    # ---- parts -------------------------------------------------------------------------------------------------------------------

    def _forward(self, rows: Array, weights: ExpertWeights, offsets: Array, activation: str, limit: float) -> tuple[Array, Array]:
        """-> down(activation(up(rows))) [R,D], what the activation was given [R,O]"""
        before = self.grouped_matmul(rows, weights.up, offsets)
        if weights.up_bias is not None:
            before += self.grouped_bias(weights.up_bias, offsets, len(rows))
        y = self.grouped_matmul(self._activated(before, activation, limit), weights.down, offsets)
        if weights.down_bias is not None:
            y += self.grouped_bias(weights.down_bias, offsets, len(rows))
        return y, before

    def _backward(
        self, dy: Array, rows: Array, weights: ExpertWeights, offsets: Array, before: Array, activation: str, limit: float
    ) -> tuple[Array, ExpertWeights]:
        """-> drows [R,D], the weights' gradients"""
        hidden = self._activated(before, activation, limit)
        dhidden = self._scratch("dhidden", hidden.shape, hidden.dtype)
        self.grouped_matmul(dy, weights.down, offsets, transpose=True, out=dhidden)
        dbefore = self._activated_backward(dhidden, before, activation, limit)
        up = self.grouped_matmul_dw(dbefore, rows, offsets)
        down = self.grouped_matmul_dw(dy, hidden, offsets)
        up_bias = None if weights.up_bias is None else self.grouped_bias_backward(dbefore, offsets)
        down_bias = None if weights.down_bias is None else self.grouped_bias_backward(dy, offsets)
        drows = self.grouped_matmul(dbefore, weights.up, offsets, transpose=True)
        return drows, ExpertWeights(up, down, up_bias, down_bias)

    def _activated(self, x: Array, activation: str, limit: float) -> Array:
        """[R,O] -> [R,H]"""
        if activation == "swiglu":
            return self.swiglu(x, limit)
        if activation == "relu":
            return self.relu(x)
        return self.gelu(x, activation == "gelu_tanh")

    def _activated_backward(self, dy: Array, x: Array, activation: str, limit: float) -> Array:
        """-> [R,O]"""
        if activation == "swiglu":
            return self.swiglu_backward(dy, x, limit)
        if activation == "relu":
            return self.relu_backward(dy, x)
        return self.gelu_backward(dy, x, activation == "gelu_tanh")


def stacked(weights: ExpertWeights) -> ExpertWeights:
    """Give each weight of a dense layer an axis of one expert."""
    return ExpertWeights(*(None if weight is None else weight[None] for weight in weights))


def written(grads: ExpertWeights, out: ExpertWeights | None, accumulate: bool) -> ExpertWeights:
    """Write each gradient into its array of `out`, or add it there; an array of `out` may be None."""
    if out is None:
        return grads
    return ExpertWeights(*(None if grad is None else put(grad, to, accumulate) for grad, to in zip(grads, out, strict=True)))
