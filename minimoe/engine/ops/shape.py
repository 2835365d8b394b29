"""The same numbers in other shapes: reshaped, selected, joined and split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minimoe.backend import Array, Backend
from minimoe.engine.ops.operands import unbroadcast
from minimoe.engine.tensor import Tensor


def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the same numbers in another shape."""
    xp, old = x.backend.xp, x.shape
    return Tensor.from_op(xp.reshape(x.data, tuple(shape)), (x,), lambda dy: xp.reshape(dy, old), owned=False)


def permute(x: Tensor, axes: Sequence[int]) -> Tensor:
    """Return the axes in another order."""
    xp, axes = x.backend.xp, tuple(axes)
    back = tuple(axes.index(i) for i in range(len(axes)))
    return Tensor.from_op(xp.permute_dims(x.data, axes), (x,), lambda dy: xp.permute_dims(dy, back), owned=False)


def broadcast_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeat x to a larger shape."""
    xp, old = x.backend.xp, x.shape
    return Tensor.from_op(xp.broadcast_to(x.data, tuple(shape)), (x,), lambda dy: unbroadcast(xp, dy, old), owned=False)


def getitem(x: Tensor, index: Any) -> Tensor:
    """Return x[index] with integers, slices, None and Ellipsis; an integer array selects rows, and equal rows add their gradients"""
    b, shape, dtype = x.backend, x.shape, x.dtype
    if isinstance(index, Tensor):
        index = index.data
    rows = hasattr(index, "dtype") or isinstance(index, list)
    index = _row_index(b, index, shape[0]) if rows else _basic_index(index)

    def backward(dy: Array) -> Array:
        dx = b.xp.zeros(shape, dtype=dtype)
        if rows:
            b.scatter_add(dx, b.xp.reshape(index, (-1,)), b.xp.reshape(dy, (-1, *shape[1:])))
        else:
            dx[cut] = b.xp.reshape(dy, cut_shape)
        return dx

    if rows:
        y = b.xp.reshape(b.xp.take(x.data, b.xp.reshape(index, (-1,)), axis=0), (*index.shape, *shape[1:]))
    else:
        y, cut = x.data[index], tuple(part for part in index if part is not None)
        cut_shape = x.data[cut].shape
    return Tensor.from_op(y, (x,), backward)


def _row_index(b: Backend, index: Any, n: int) -> Array:
    """Row numbers as an int32 array of the backend, negative ones counted from the end of n."""
    if not isinstance(index, type(b.xp.zeros(()))):
        index = b.from_host(np.asarray(index))
    if not b.xp.isdtype(index.dtype, "integral"):
        raise TypeError(f"x[index]: an array index holds row numbers, got {index.dtype} (for a mask use ops.where)")
    index = b.xp.astype(index, b.xp.int32)
    return b.xp.where(index < 0, index + n, index)


def _basic_index(index: Any) -> tuple[Any, ...]:
    """Integers, slices and None, with the Ellipsis that the Array API standard asks for."""
    parts = index if isinstance(index, tuple) else (index,)
    if any((hasattr(part, "shape") and part.shape) or isinstance(part, list) for part in parts):
        raise TypeError("x[index]: an array of row numbers must be the only index, without slices or other arrays")
    return parts if any(part is Ellipsis for part in parts) else (*parts, ...)


def concat(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Join tensors one after another along an axis."""
    xp, axis = tensors[0].backend.xp, axis % tensors[0].ndim
    sizes = [t.shape[axis] for t in tensors]

    def backward(dy: Array) -> tuple[Array, ...]:
        start, parts = 0, []
        for size in sizes:
            parts.append(dy[(slice(None),) * axis + (slice(start, start + size), ...)])
            start += size
        return tuple(parts)

    return Tensor.from_op(xp.concat([t.data for t in tensors], axis=axis), tuple(tensors), backward, owned=False)


def split(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Cut the last axis into pieces of these sizes.   [...,sum(sizes)] -> [...,sizes[i]] each"""
    xp, shape, dtype, starts = x.backend.xp, x.shape, x.dtype, [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    pieces = [(..., slice(start, stop)) for start, stop in zip(starts, starts[1:], strict=False)]

    def backward(*gradients: Array | None) -> Array:
        dx = xp.empty(shape, dtype=dtype)
        for piece, gradient in zip(pieces, gradients, strict=True):
            dx[piece] = 0.0 if gradient is None else gradient
        return dx

    return Tensor.from_op(tuple(x.data[piece] for piece in pieces), (x,), backward)


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors of one shape along a new first axis."""
    return concat([reshape(t, (1, *t.shape)) for t in tensors], axis=0)
