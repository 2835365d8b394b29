"""Sums, means and maxima over axes, and the softmax over the last."""

from __future__ import annotations

import math
from typing import Any

from minimoe.backend import Array
from minimoe.engine.tensor import Tensor

Axis = int | tuple[int, ...] | None


def _axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    chosen = range(ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
    return tuple(a % ndim for a in chosen)


def _unreduce(xp: Any, reduced: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """Return a reduced array with its axes restored and repeated."""
    return xp.broadcast_to(xp.reshape(reduced, tuple(1 if i in axes else size for i, size in enumerate(shape))), shape)


def sum(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Sum over some axes, or all.   dx = dy, repeated"""
    xp, shape, axes = x.backend.xp, x.shape, _axes(axis, x.ndim)
    y = xp.sum(x.data, axis=axes, keepdims=keepdims)
    return Tensor.from_op(y, (x,), lambda dy: _unreduce(xp, dy, shape, axes), owned=False)


def mean(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Average over some axes, or all.   dx = dy / n, repeated"""
    n = math.prod(x.shape[a] for a in _axes(axis, x.ndim))
    return sum(x, axis, keepdims) * (1.0 / n if n else math.nan)


def max(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Take the largest element over some axes, or all; ties share the gradient."""
    xp, xa, axes = x.backend.xp, x.data, _axes(axis, x.ndim)
    y = xp.max(xa, axis=axes, keepdims=keepdims)

    def backward(dy: Array) -> Array:
        hit = xp.astype(xa == _unreduce(xp, y, xa.shape, axes), xa.dtype)
        return _unreduce(xp, dy, xa.shape, axes) * hit / xp.sum(hit, axis=axes, keepdims=True)

    return Tensor.from_op(y, (x,), backward)


def logsumexp(x: Tensor) -> Tensor:
    """ln sum e^x over the last axis.   dx = dy softmax(x).   [...,E] -> [...]"""
    b, xa = x.backend, x.data
    return Tensor.from_op(b.logsumexp(xa), (x,), lambda dy: b.softmax(xa) * dy[..., None])


def softmax(x: Tensor) -> Tensor:
    """e^x over its sum, along the last axis.   dx = y (dy - sum(dy y))"""
    xp, y = x.backend.xp, x.backend.softmax(x.data)
    return Tensor.from_op(y, (x,), lambda dy: y * (dy - xp.sum(dy * y, axis=-1, keepdims=True)))
