"""Arithmetic of two tensors, with broadcasting."""

from __future__ import annotations

from typing import Any

from minimoe.backend import Array
from minimoe.engine.ops.operands import operands, unbroadcast
from minimoe.engine.tensor import Tensor


def add(a: Any, b: Any) -> Tensor:
    """a + b, broadcast"""
    a, b = operands("add", a, b)
    xp, sa, sb = a.backend.xp, a.shape, b.shape
    return Tensor.from_op(a.data + b.data, (a, b), lambda dy: (unbroadcast(xp, dy, sa), unbroadcast(xp, dy, sb)), owned=False)


def subtract(a: Any, b: Any) -> Tensor:
    """a - b, broadcast"""
    a, b = operands("subtract", a, b)
    xp, sa, sb = a.backend.xp, a.shape, b.shape
    return Tensor.from_op(a.data - b.data, (a, b), lambda dy: (unbroadcast(xp, dy, sa), unbroadcast(xp, -dy, sb)), owned=False)


def multiply(a: Any, b: Any) -> Tensor:
    """a * b, broadcast.   da = dy b, db = dy a"""
    a, b = operands("multiply", a, b)
    xp, xa, xb, need_a, need_b = a.backend.xp, a.data, b.data, a.requires_grad, b.requires_grad

    def backward(dy: Array) -> tuple[Array | None, Array | None]:
        return unbroadcast(xp, dy * xb, xa.shape) if need_a else None, unbroadcast(xp, dy * xa, xb.shape) if need_b else None

    return Tensor.from_op(xa * xb, (a, b), backward)


def divide(a: Any, b: Any) -> Tensor:
    """a / b, broadcast.   da = dy / b, db = -dy a / b^2"""
    a, b = operands("divide", a, b)
    xp, xa, xb, need_a, need_b = a.backend.xp, a.data, b.data, a.requires_grad, b.requires_grad

    def backward(dy: Array) -> tuple[Array | None, Array | None]:
        da = dy / xb
        return unbroadcast(xp, da, xa.shape) if need_a else None, unbroadcast(xp, -da * xa / xb, xb.shape) if need_b else None

    return Tensor.from_op(xa / xb, (a, b), backward)


def power(a: Tensor, exponent: float) -> Tensor:
    """a ^ exponent, a constant exponent.   da = dy exponent a^(exponent-1)"""
    xa = a.data
    return Tensor.from_op(xa**exponent, (a,), lambda dy: dy * (exponent * xa ** (exponent - 1.0)))


def matmul(a: Any, b: Any) -> Tensor:
    """a b over the last two axes, the others broadcast.   da = dy b^T, db = a^T dy.   [...,N,I], [...,I,O] -> [...,N,O]"""
    a, b = operands("matmul", a, b)
    if a.ndim < 2 or b.ndim < 2:
        raise ValueError(f"matmul: both sides need two axes or more, got {a.shape} and {b.shape}")
    xp, xa, xb, need_a, need_b = a.backend.xp, a.data, b.data, a.requires_grad, b.requires_grad

    def backward(dy: Array) -> tuple[Array | None, Array | None]:
        da = unbroadcast(xp, xp.matmul(dy, xp.matrix_transpose(xb)), xa.shape) if need_a else None
        return da, unbroadcast(xp, xp.matmul(xp.matrix_transpose(xa), dy), xb.shape) if need_b else None

    return Tensor.from_op(xp.matmul(xa, xb), (a, b), backward)


def where(condition: Array, a: Any, b: Any) -> Tensor:
    """a where the condition (an array) holds, else b; broadcast"""
    a, b = operands("where", a, b)
    xp, sa, sb = a.backend.xp, a.shape, b.shape

    def backward(dy: Array) -> tuple[Array, Array]:
        zeros = xp.zeros_like(dy)
        return unbroadcast(xp, xp.where(condition, dy, zeros), sa), unbroadcast(xp, xp.where(condition, zeros, dy), sb)

    return Tensor.from_op(xp.where(condition, a.data, b.data), (a, b), backward)
