"""Every differentiable operation, once: a kernel's call and the closure of its gradient.

No formula stands here but the plain elementwise ones; the others stand in `minimoe/reference/`, forward and backward side by side.

A closure binds arrays, never tensors: no cycle of references, and an optimizer that gives a parameter a new array cannot change a
gradient behind its back. A gradient that no input needs is not computed.
"""


import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from minimoe.backend import Array, Backend
from minimoe.engine.creation import tensor
from minimoe.engine.tensor import Tensor
from minimoe.reference.expert import ExpertWeights
from minimoe.reference.gating import Gate, Rule
from minimoe.reference.loss import IGNORE
from minimoe.reference.random import Draw
from minimoe.reference.routing import Plan

Axis = int | tuple[int, ...] | None
Places = list[dict[str, Any]]
"""Where the gradients of an operation's inputs may be written, `out` and `accumulate` of a kernel, or {}."""

# ---- arithmetic, with broadcasting ------------------------------------------------------------------------------------------------


def _both(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Two operands as tensors, where numbers and plain arrays become constants of the other's backend and dtype."""
    like = a if isinstance(a, Tensor) else b
    a, b = _constant(a, like), _constant(b, like)
    if a.backend is not b.backend:
        raise ValueError(f"one operation on two backends, {a.backend.name} and {b.backend.name}: convert one side first")
    return a, b


def _constant(value: Any, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    xp, whole = like.backend.xp, not like.backend.xp.isdtype(like.dtype, "real floating")
    if isinstance(value, float) and whole:
        raise TypeError(f"a tensor of {like.dtype} with {value}, a float: make it one of floats first, tensor.astype('float32')")
    if isinstance(value, int | float):
        return Tensor(xp.full((), value, dtype=like.dtype), like.backend)
    if not isinstance(value, type(like.data)):
        value = tensor(value, backend=like.backend).data
    if whole and xp.isdtype(value.dtype, "real floating"):
        raise TypeError(f"a tensor of {like.dtype} with an array of {value.dtype}: make both floats first, tensor.astype('float32')")
    return Tensor(value if value.dtype == like.dtype else xp.astype(value, like.dtype), like.backend)


def _fit(xp: Any, gradient: Array, shape: tuple[int, ...]) -> Array:
    """Undo broadcasting: sum a gradient over the axes along which its operand was repeated."""
    if tuple(gradient.shape) == shape:
        return gradient
    extra = gradient.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(extra + i for i, size in enumerate(shape) if size == 1 and gradient.shape[extra + i] != 1)
    return xp.reshape(xp.sum(gradient, axis=axes, keepdims=True), shape)


def add(a: Any, b: Any) -> Tensor:
    """a + b, broadcast"""
    a, b = _both(a, b)
    xp, sa, sb = a.backend.xp, a.shape, b.shape
    return Tensor.from_op(a.data + b.data, (a, b), lambda dy: (_fit(xp, dy, sa), _fit(xp, dy, sb)), aliases=True)


def subtract(a: Any, b: Any) -> Tensor:
    """a - b, broadcast"""
    a, b = _both(a, b)
    xp, sa, sb = a.backend.xp, a.shape, b.shape
    return Tensor.from_op(a.data - b.data, (a, b), lambda dy: (_fit(xp, dy, sa), _fit(xp, -dy, sb)), aliases=True)


def multiply(a: Any, b: Any) -> Tensor:
    """a * b, broadcast.   da = dy b, db = dy a"""
    a, b = _both(a, b)
    xp, xa, xb, need_a, need_b = a.backend.xp, a.data, b.data, a.requires_grad, b.requires_grad

    def backward(dy: Array) -> tuple[Array | None, Array | None]:
        return _fit(xp, dy * xb, xa.shape) if need_a else None, _fit(xp, dy * xa, xb.shape) if need_b else None

    return Tensor.from_op(xa * xb, (a, b), backward)


def divide(a: Any, b: Any) -> Tensor:
    """a / b, broadcast.   da = dy / b, db = -dy a / b^2"""
    a, b = _both(a, b)
    xp, xa, xb, need_a, need_b = a.backend.xp, a.data, b.data, a.requires_grad, b.requires_grad

    def backward(dy: Array) -> tuple[Array | None, Array | None]:
        da = dy / xb
        return _fit(xp, da, xa.shape) if need_a else None, _fit(xp, -da * xa / xb, xb.shape) if need_b else None

    return Tensor.from_op(xa / xb, (a, b), backward)


def power(a: Tensor, exponent: float) -> Tensor:
    """a ^ exponent, a constant exponent.   da = dy exponent a^(exponent-1)"""
    xa = a.data
    return Tensor.from_op(xa**exponent, (a,), lambda dy: dy * (exponent * xa ** (exponent - 1.0)))


def matmul(a: Any, b: Any) -> Tensor:
    """a b over the last two axes, the others broadcast.   da = dy b^T, db = a^T dy.   [...,N,K], [...,K,M] -> [...,N,M]"""
    a, b = _both(a, b)
    if a.ndim < 2 or b.ndim < 2:
        raise ValueError(f"matmul: both sides need two axes or more, got {a.shape} and {b.shape}")
    xp, xa, xb, need_a, need_b = a.backend.xp, a.data, b.data, a.requires_grad, b.requires_grad

    def backward(dy: Array) -> tuple[Array | None, Array | None]:
        da = _fit(xp, xp.matmul(dy, xp.matrix_transpose(xb)), xa.shape) if need_a else None
        return da, _fit(xp, xp.matmul(xp.matrix_transpose(xa), dy), xb.shape) if need_b else None

    return Tensor.from_op(xp.matmul(xa, xb), (a, b), backward)


# ---- elementwise functions ----------------------------------------------------------------------------------------------------------


def exp(x: Tensor) -> Tensor:
    """e^x.   dx = dy y"""
    y = x.backend.xp.exp(x.data)
    return Tensor.from_op(y, (x,), lambda dy: dy * y)


def log(x: Tensor) -> Tensor:
    """ln x.   dx = dy / x"""
    xa = x.data
    return Tensor.from_op(x.backend.xp.log(xa), (x,), lambda dy: dy / xa)


def tanh(x: Tensor) -> Tensor:
    """dx = dy (1 - y^2)"""
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
    """x Phi(x), or its tanh form"""
    b, xa = x.backend, x.data
    return Tensor.from_op(b.gelu(xa, tanh), (x,), lambda dy: b.gelu_backward(dy, xa, tanh))


def relu(x: Tensor) -> Tensor:
    """max(x, 0)"""
    b, xa = x.backend, x.data
    return Tensor.from_op(b.relu(xa), (x,), lambda dy: b.relu_backward(dy, xa))


def swiglu(gate_up: Tensor, limit: float = 0.0) -> Tensor:
    """silu(gate) * up of the two halves.   [...,2H] -> [...,H]"""
    b, xa = gate_up.backend, gate_up.data
    return Tensor.from_op(b.swiglu(xa, limit), (gate_up,), lambda dy: b.swiglu_backward(dy, xa, limit))


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of that name: swiglu [...,2H] -> [...,H], gelu, gelu_tanh, relu."""
    b, xa = x.backend, x.data
    return Tensor.from_op(b.activate(xa, activation), (x,), lambda dy: b.activate_backward(dy, xa, activation))


def astype(x: Tensor, dtype: Any) -> Tensor:
    """x in another floating dtype; the gradient comes back in x's."""
    xp, old = x.backend.xp, x.dtype
    new = x.backend.dtype(dtype) if isinstance(dtype, str) else dtype
    if new == old:
        return x

    def backward(dy: Array, into: Places) -> Array:
        if not into[0] or into[0]["accumulate"]:
            return xp.astype(dy, old)
        into[0]["out"][...] = dy  # rounded where it is kept, without another array
        return into[0]["out"]

    return Tensor.from_op(xp.astype(x.data, new), (x,), backward, into=True)


def where(condition: Array, a: Any, b: Any) -> Tensor:
    """a where the condition (an array) holds, else b; broadcast"""
    a, b = _both(a, b)
    xp, sa, sb = a.backend.xp, a.shape, b.shape

    def backward(dy: Array) -> tuple[Array, Array]:
        zeros = xp.zeros_like(dy)
        return _fit(xp, xp.where(condition, dy, zeros), sa), _fit(xp, xp.where(condition, zeros, dy), sb)

    return Tensor.from_op(xp.where(condition, a.data, b.data), (a, b), backward)


# ---- reductions -----------------------------------------------------------------------------------------------------------------------


def _axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    chosen = range(ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
    return tuple(a % ndim for a in chosen)


def _unreduce(xp: Any, reduced: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """A reduced array with its axes back, repeated along them."""
    return xp.broadcast_to(xp.reshape(reduced, tuple(1 if i in axes else size for i, size in enumerate(shape))), shape)


def sum(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The sum over some axes, or all.   dx = dy, repeated"""
    xp, shape, axes = x.backend.xp, x.shape, _axes(axis, x.ndim)
    y = xp.sum(x.data, axis=axes, keepdims=keepdims)
    return Tensor.from_op(y, (x,), lambda dy: _unreduce(xp, dy, shape, axes), aliases=True)


def mean(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The mean over some axes, or all.   dx = dy / n, repeated"""
    n = math.prod(x.shape[a] for a in _axes(axis, x.ndim))
    return sum(x, axis, keepdims) * (1.0 / n if n else math.nan)


def max(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The largest over some axes, or all. Ties share the gradient."""
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


# ---- shape ----------------------------------------------------------------------------------------------------------------------------


def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The same numbers in another shape"""
    xp, old = x.backend.xp, x.shape
    return Tensor.from_op(xp.reshape(x.data, tuple(shape)), (x,), lambda dy: xp.reshape(dy, old), aliases=True)


def permute(x: Tensor, axes: Sequence[int]) -> Tensor:
    """Axes in another order"""
    xp, axes = x.backend.xp, tuple(axes)
    back = tuple(axes.index(i) for i in range(len(axes)))
    return Tensor.from_op(xp.permute_dims(x.data, axes), (x,), lambda dy: xp.permute_dims(dy, back), aliases=True)


def broadcast_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    """x repeated to a larger shape"""
    xp, old = x.backend.xp, x.shape
    return Tensor.from_op(xp.broadcast_to(x.data, tuple(shape)), (x,), lambda dy: _fit(xp, dy, old), aliases=True)


def getitem(x: Tensor, index: Any) -> Tensor:
    """x[index] with integers, slices, None and Ellipsis; an integer array selects rows, and equal rows add their gradients"""
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
            dx[place] = b.xp.reshape(dy, place_shape)
        return dx

    if rows:
        y = b.xp.reshape(b.xp.take(x.data, b.xp.reshape(index, (-1,)), axis=0), (*index.shape, *shape[1:]))
    else:
        y, place = x.data[index], tuple(part for part in index if part is not None)
        place_shape = x.data[place].shape
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
        raise TypeError("x[index]: an array of row numbers stands alone, not among slices or other arrays")
    return parts if any(part is Ellipsis for part in parts) else (*parts, ...)


def concat(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Tensors one after another along an axis"""
    xp, axis = tensors[0].backend.xp, axis % tensors[0].ndim
    sizes = [t.shape[axis] for t in tensors]

    def backward(dy: Array) -> tuple[Array, ...]:
        start, parts = 0, []
        for size in sizes:
            parts.append(dy[(slice(None),) * axis + (slice(start, start + size), ...)])
            start += size
        return tuple(parts)

    return Tensor.from_op(xp.concat([t.data for t in tensors], axis=axis), tuple(tensors), backward, aliases=True)


def split(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """The last axis cut into pieces of these sizes.   [...,sum(sizes)] -> [...,sizes[i]] each"""
    xp, shape, dtype, starts = x.backend.xp, x.shape, x.dtype, [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    places = [(..., slice(start, stop)) for start, stop in zip(starts, starts[1:], strict=False)]

    def backward(*gradients: Array | None) -> Array:
        dx = xp.empty(shape, dtype=dtype)
        for place, gradient in zip(places, gradients, strict=True):
            dx[place] = 0.0 if gradient is None else gradient
        return dx

    return Tensor.from_op(tuple(x.data[place] for place in places), (x,), backward)


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape along a new first axis"""
    return concat([reshape(t, (1, *t.shape)) for t in tensors], axis=0)


# ---- layers ---------------------------------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b.   x [...,I], weight [O,I], bias [O] -> [...,O]"""
    b, xa, wa = x.backend, x.data, weight.data
    if xa.shape[-1] != wa.shape[1] or xa.dtype != wa.dtype:
        raise ValueError(f"linear: x {x.shape} {x.dtype} does not fit weight {weight.shape} {weight.dtype}, [...,I] and [O,I] of one dtype")
    need_x, need_w = x.requires_grad, weight.requires_grad

    def backward(dy: Array, into: Places) -> tuple[Array | None, ...]:
        dx = b.linear_dx(dy, wa, **into[0]) if need_x else None
        dw = b.linear_dw(dy, xa, **into[1]) if need_w else None
        return (dx, dw) if bias_data is None else (dx, dw, b.linear_db(dy, **into[2]))

    bias_data = None if bias is None else bias.data
    parents = (x, weight) if bias is None else (x, weight, bias)
    return Tensor.from_op(b.linear(xa, wa, bias_data), parents, backward, into=True)


def embedding(ids: Array, weight: Tensor, padding: int | None = None) -> Tensor:
    """A row of the table for each id.   ids [...] int32, weight [V,D] -> [...,D]"""
    b, vocab = weight.backend, weight.shape[0]

    def backward(dy: Array, into: Places) -> Array:
        return b.embedding_backward(dy, ids, vocab, padding, **into[0])

    return Tensor.from_op(b.embedding(ids, weight.data), (weight,), backward, into=True)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """x / rms(x) * weight over the last axis.   x [...,D], weight [D]"""
    b, xa, wa = x.backend, x.data, weight.data
    y, rstd = b.rms_norm(xa, wa, eps)
    return Tensor.from_op(y, (x, weight), lambda dy: b.rms_norm_backward(dy, xa, wa, rstd))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / std * weight + bias over the last axis.   x [...,D], weight, bias [D]"""
    b, xa, wa, has_bias = x.backend, x.data, weight.data, bias is not None
    y, mean, rstd = b.layer_norm(xa, wa, None if bias is None else bias.data, eps)

    def backward(dy: Array) -> tuple[Array, ...]:
        return b.layer_norm_backward(dy, xa, wa, mean, rstd)[: 3 if has_bias else 2]

    return Tensor.from_op(y, (x, weight) if bias is None else (x, weight, bias), backward)


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, eps: float, norm: str) -> tuple[Tensor, Tensor]:
    """total = x + delta and its norm ("rms" or "layer"), fused.   x, delta [...,D] -> total, y [...,D]"""
    b, has_bias = x.backend, bias is not None
    if norm == "rms":
        outputs, saved = b.add_rms_norm(x.data, delta.data, weight.data, eps)
    else:
        outputs, saved = b.add_layer_norm(x.data, delta.data, weight.data, None if bias is None else bias.data, eps)

    def backward(dtotal: Array | None, dy: Array | None) -> tuple[Array | None, ...]:
        if dy is None:
            return (dtotal, dtotal, None, None)[: 4 if has_bias else 3]
        dx, *dweights = (b.add_rms_norm_backward if norm == "rms" else b.add_layer_norm_backward)(dtotal, dy, saved)
        return (dx, dx, *dweights[: 2 if has_bias else 1])

    parents = (x, delta, weight) if bias is None else (x, delta, weight, bias)
    return Tensor.from_op(outputs, parents, backward, aliases=True)


def rope(x: Tensor, positions: Array, inv_freq: Array, scale: float = 1.0, interleaved: bool = False) -> Tensor:
    """Rotary positions.   x [B,T,heads,C], positions [B or 1,T], inv_freq [C/2]"""
    b = x.backend
    y = b.rope(x.data, positions, inv_freq, scale, interleaved)
    return Tensor.from_op(y, (x,), lambda dy: b.rope_backward(dy, positions, inv_freq, scale, interleaved))


def split_heads(qkv: Tensor, positions: Array, inv_freq: Array | None, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """The heads of q, k and v from one projection, q and k turned.   qkv [B,T,(Q+2G)*C] -> q [B,T,Q,C], k, v [B,T,G,C]"""
    b, qkv_data = qkv.backend, qkv.data
    outputs = b.split_heads(qkv_data, positions, inv_freq, heads=heads, groups=groups)
    shapes, dtype = [array.shape for array in outputs], qkv.dtype

    def backward(*gradients: Array | None) -> Array:
        dq, dk, dv = (b.xp.zeros(shape, dtype=dtype) if d is None else d for d, shape in zip(gradients, shapes, strict=True))
        return b.split_heads_backward(dq, dk, dv, positions, inv_freq)

    return Tensor.from_op(outputs, (qkv,), backward)


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, **options: Any) -> Tensor:
    """Scaled dot-product attention.   q [B,Tq,Q,C], k [B,Tk,G,C], v [B,Tk,G,Cv] -> [B,Tq,Q,Cv]; options as the kernel's"""
    b, arrays = q.backend, (q.data, k.data, v.data)
    sink_data = None if sinks is None else sinks.data
    y, lse = b.attention(*arrays, sinks=sink_data, **options)

    def backward(dy: Array) -> tuple[Array, ...]:
        gradients = b.attention_backward(dy, *arrays, y, lse, sinks=sink_data, **options)
        return gradients[:3] if sink_data is None else gradients

    return Tensor.from_op(y, (q, k, v) if sinks is None else (q, k, v, sinks), backward)


def dropout(x: Tensor, rate: float, draw: Draw) -> Tensor:
    """x / (1 - rate) where kept, else 0"""
    b = x.backend
    return Tensor.from_op(b.dropout(x.data, rate, draw), (x,), lambda dy: b.dropout_backward(dy, rate, draw))


def cross_entropy(logits: Tensor, targets: Array, ignore: int = IGNORE) -> tuple[Tensor, Array]:
    """logits [N,V], targets [N] int32 -> the sum in nats over valid targets, and their number (0-d array)"""
    b, la = logits.backend, logits.data
    total, count, lse = b.cross_entropy(la, targets, ignore)
    y = Tensor.from_op(total, (logits,), lambda dy: b.cross_entropy_backward(dy, la, targets, lse, ignore))
    return y, count


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Array, ignore: int = IGNORE) -> tuple[Tensor, Array]:
    """cross_entropy(x W^T), fused.   x [N,D], weight [V,D], targets [N] -> the sum in nats, the number of valid targets (0-d array)"""
    b = x.backend
    (total, count), saved = b.linear_cross_entropy(x.data, weight.data, targets, ignore)

    def backward(dy: Array, into: Places) -> tuple[Array, Array]:
        return b.linear_cross_entropy_backward(dy, saved, ignore, **into[1])

    return Tensor.from_op(total, (x, weight), backward, into=True), count


# ---- experts --------------------------------------------------------------------------------------------------------------------------


def gate(logits: Tensor, bias: Array | None, valid: Array | None, rule: Rule) -> tuple[Tensor, Tensor, Gate]:
    """logits [N,E] -> combine weights [N,W], probability sums [E]; and the whole Gate as arrays"""
    b = logits.backend
    result = b.gate(logits.data, bias, valid, rule=rule)

    def backward(dweights: Array | None, dprob_sum: Array | None) -> Array:
        return b.gate_backward(dweights, dprob_sum, result, valid, rule=rule)

    weights, prob_sum = Tensor.from_op((result.weights, result.prob_sum), (logits,), backward)
    return weights, prob_sum, result


def noisy_load(clean: Tensor, noisy: Tensor, sigma: Tensor, valid: Array | None, k: int) -> Tensor:
    """The smooth load of noisy top-k gating.   [N,E] each -> [E]"""
    b, za, ha, sa = clean.backend, clean.data, noisy.data, sigma.data
    load, ids = b.noisy_load(za, ha, sa, valid, k=k)
    return Tensor.from_op(load, (clean, noisy, sigma), lambda dy: b.noisy_load_backward(dy, za, ha, sa, ids, valid, k=k))


def expert_sum(weights: Tensor, ids: Array, valid: Array | None, n_experts: int) -> Tensor:
    """The sum of combine weights that each expert got (its importance).   weights [N,K], ids [N,K] -> [E]"""
    xp, experts = weights.backend.xp, weights.backend.xp.arange(n_experts, dtype=ids.dtype)
    hit = ids[:, :, None] == experts  # [N,K,E]
    if valid is not None:
        hit = hit & valid[:, None, None]
    mask = xp.astype(hit, weights.dtype)
    y = xp.sum(mask * weights.data[:, :, None], axis=(0, 1))
    return Tensor.from_op(y, (weights,), lambda dy: xp.sum(mask * dy, axis=-1))


def ffn(x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None, activation: str) -> Tensor:
    """down(activation(up(x))), fused.   x [...,D], up [O,D], down [D,H], biases [O], [D] -> [...,D]"""
    b = x.backend
    optional = [t for t in (up_bias, down_bias) if t is not None]
    weights = ExpertWeights(up.data, down.data, *(None if t is None else t.data for t in (up_bias, down_bias)))
    y, saved = b.ffn(x.data, weights, activation)

    def backward(dy: Array, into: Places) -> tuple[Array, ...]:
        dx, dweights = b.ffn_backward(dy, saved, activation, **_expert_places(into[1:], weights))
        return (dx, *(d for d in dweights if d is not None))

    return Tensor.from_op(y, (x, up, down, *optional), backward, into=True)


def moe_ffn(
    x: Tensor, gate_weights: Tensor, plan: Plan, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None,
    activation: str, limit: float = 0.0,
) -> Tensor:  # fmt: skip
    """Dispatch, experts, combine.   x [N,D], gate_weights [N,W], up [E,O,D], down [E,D,H]; limit > 0: clipped swiglu -> [N,D]"""
    b = x.backend
    optional = [t for t in (up_bias, down_bias) if t is not None]
    weights = ExpertWeights(up.data, down.data, *(None if t is None else t.data for t in (up_bias, down_bias)))
    y, saved = b.moe_ffn(x.data, gate_weights.data, plan, weights, activation, limit)

    def backward(dy: Array, into: Places) -> tuple[Array, ...]:
        dx, dgate, dexperts = b.moe_ffn_backward(dy, saved, activation, limit, **_expert_places(into[2:], weights))
        return (dx, dgate, *(d for d in dexperts if d is not None))

    return Tensor.from_op(y, (x, gate_weights, up, down, *optional), backward, into=True)


def _expert_places(places: Places, weights: ExpertWeights) -> dict[str, Any]:
    """The places of one layer's weights as one; nothing where they differ in kind."""
    if not all(places) or len({place["accumulate"] for place in places}) > 1:
        return {}
    out = iter(place["out"] for place in places)
    return {"out": ExpertWeights(*(None if w is None else next(out) for w in weights)), "accumulate": places[0]["accumulate"]}
