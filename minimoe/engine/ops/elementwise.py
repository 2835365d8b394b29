"""Functions of each element: exponentials, activations, dropout, and other dtypes."""

from __future__ import annotations

from typing import Any

from minimoe.backend import Array
from minimoe.engine.buffers import Out
from minimoe.engine.grad_mode import grad_enabled
from minimoe.engine.tensor import Tensor
from minimoe.reference.random import Draw


def exp(x: Tensor) -> Tensor:
    """e^x.   dx = dy y"""
    y = x.backend.xp.exp(x.data)
    return Tensor.from_op(y, (x,), lambda dy: dy * y)


def log(x: Tensor) -> Tensor:
    """ln x.   dx = dy / x"""
    xa = x.data
    return Tensor.from_op(x.backend.xp.log(xa), (x,), lambda dy: dy / xa)


def tanh(x: Tensor) -> Tensor:
    """tanh x.   dx = dy (1 - y^2)"""
    y = x.backend.xp.tanh(x.data)
    return Tensor.from_op(y, (x,), lambda dy: dy * (1.0 - y * y))


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x).   dx = dy y (1 - y)"""
    y = x.backend.sigmoid(x.data)
    return Tensor.from_op(y, (x,), lambda dy: dy * y * (1.0 - y))


def softplus(x: Tensor) -> Tensor:
    """ln(1 + e^x).   dx = dy sigmoid(x)"""
    b, xa = x.backend, x.data
    y = b.xp.logaddexp(xa, b.xp.zeros_like(xa))
    return Tensor.from_op(y, (x,), lambda dy: dy * b.sigmoid(xa))


def gelu(x: Tensor, tanh: bool = False) -> Tensor:
    """x Phi(x), or its approximation by tanh"""
    b, xa = x.backend, x.data
    return Tensor.from_op(b.gelu(xa, tanh), (x,), lambda dy: b.gelu_backward(dy, xa, tanh))


def relu(x: Tensor) -> Tensor:
    """max(x, 0)"""
    b, xa = x.backend, x.data
    return Tensor.from_op(b.relu(xa), (x,), lambda dy: b.relu_backward(dy, xa))


def swiglu(gate_up: Tensor, limit: float = 0.0) -> Tensor:
    """silu(gate) * up, of the two halves of the last axis.   [...,2H] -> [...,H]"""
    b, xa = gate_up.backend, gate_up.data
    return Tensor.from_op(b.swiglu(xa, limit), (gate_up,), lambda dy: b.swiglu_backward(dy, xa, limit))


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply the activation of this name: swiglu [...,2H] -> [...,H], gelu, gelu_tanh, relu."""
    b, xa = x.backend, x.data
    return Tensor.from_op(b.activate(xa, activation), (x,), lambda dy: b.activate_backward(dy, xa, activation))


def astype(x: Tensor, dtype: Any) -> Tensor:
    """Convert x to another floating dtype; the gradient comes back in x's.

    That of a parameter which is rounded to bfloat16 is never rounded itself: kernels add it up where the parameter keeps it.
    """
    xp, old = x.backend.xp, x.dtype
    new = x.backend.dtype(dtype) if isinstance(dtype, str) else dtype
    if new == old:
        return x
    if x.node is None and "bfloat16" in x.backend.dtypes and new == x.backend.dtype("bfloat16"):
        copy = Tensor(xp.astype(x.data, new), x.backend, x.requires_grad and grad_enabled())
        copy.leaf = x
        return copy

    def backward(dy: Array, outs: list[Out]) -> Array:
        if not outs[0] or outs[0]["accumulate"]:
            return xp.astype(dy, old)
        outs[0]["out"][...] = dy  # rounded where it is kept, without another array
        return outs[0]["out"]

    return Tensor.from_op(xp.astype(x.data, new), (x,), backward, outs=True)


def dropout(x: Tensor, rate: float, draw: Draw) -> Tensor:
    """x / (1 - rate) where the draw keeps it, else 0"""
    b = x.backend
    return Tensor.from_op(b.dropout(x.data, rate, draw), (x,), lambda dy: b.dropout_backward(dy, rate, draw))
