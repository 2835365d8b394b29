"""Helpers of operations on two tensors: they bring operands to one backend and dtype, and undo broadcasting."""

from __future__ import annotations

from typing import Any

from minimoe.backend import Array
from minimoe.engine import errors
from minimoe.engine.creation import array_like, tensor
from minimoe.engine.tensor import Tensor


def operands(name: str, a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Return two operands as tensors; numbers and plain arrays become constants of the other's backend and dtype."""
    like = a if isinstance(a, Tensor) else b
    a, b = constant(a, like), constant(b, like)
    if a.backend is not b.backend:
        raise errors.mixed_backends(name, a, b)
    return a, b


def constant(value: Any, like: Tensor) -> Tensor:
    """Return a value as a tensor; a number or an array takes the backend and dtype of `like`."""
    if isinstance(value, Tensor):
        return value
    xp, whole = like.backend.xp, not like.backend.xp.isdtype(like.dtype, "real floating")
    if isinstance(value, float) and whole:
        raise TypeError(f"a tensor of {like.dtype} with the float {value}: convert the tensor first, tensor.astype('float32')")
    if isinstance(value, int | float):
        return Tensor(xp.full((), value, dtype=like.dtype), like.backend)
    if not isinstance(value, type(like.data)):
        value = tensor(value, backend=like.backend).data
    if whole and xp.isdtype(value.dtype, "real floating"):
        raise TypeError(f"a tensor of {like.dtype} with an array of {value.dtype}: convert the tensor first, tensor.astype('float32')")
    return Tensor(array_like(value, like), like.backend)


def unbroadcast(xp: Any, gradient: Array, shape: tuple[int, ...]) -> Array:
    """Return a gradient summed over the axes along which broadcasting repeated its operand, in the operand's shape."""
    if tuple(gradient.shape) == shape:
        return gradient
    extra = gradient.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(extra + i for i, size in enumerate(shape) if size == 1 and gradient.shape[extra + i] != 1)
    return xp.reshape(xp.sum(gradient, axis=axes, keepdims=True), shape)
