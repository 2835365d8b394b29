"""The layers of a dense Transformer: linear, embedding, norms, rotary positions and attention."""

from __future__ import annotations

from typing import Any

from minimoe.backend import Array
from minimoe.engine.buffers import Out
from minimoe.engine.tensor import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b.   x [...,I], weight [O,I], bias [O] -> [...,O]"""
    b, xa, wa = x.backend, x.data, weight.data
    if xa.shape[-1] != wa.shape[1] or xa.dtype != wa.dtype:
        raise ValueError(f"linear: x {x.shape} {x.dtype} does not fit weight {weight.shape} {weight.dtype}, [...,I] and [O,I] of one dtype")
    need_x, need_w = x.requires_grad, weight.requires_grad

    def backward(dy: Array, outs: list[Out]) -> tuple[Array | None, ...]:
        dx = b.linear_dx(dy, wa, **outs[0]) if need_x else None
        dw = b.linear_dw(dy, xa, **outs[1]) if need_w else None
        return (dx, dw) if bias_data is None else (dx, dw, b.linear_db(dy, **outs[2]))

    bias_data = None if bias is None else bias.data
    parents = (x, weight) if bias is None else (x, weight, bias)
    return Tensor.from_op(b.linear(xa, wa, bias_data), parents, backward, outs=True)


def embedding(ids: Array, weight: Tensor, padding: int | None = None) -> Tensor:
    """Look up the row of the table for each id.   ids [...] int32, weight [V,D] -> [...,D]"""
    b, vocab = weight.backend, weight.shape[0]

    def backward(dy: Array, outs: list[Out]) -> Array:
        return b.embedding_backward(dy, ids, vocab, padding, **outs[0])

    return Tensor.from_op(b.embedding(ids, weight.data), (weight,), backward, outs=True)


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
    return Tensor.from_op(outputs, parents, backward, owned=False)


def rope(x: Tensor, positions: Array, inv_freq: Array, scale: float = 1.0, interleaved: bool = False) -> Tensor:
    """Rotate x by its positions (rotary position embedding).   x [B,T,heads,C], positions [B or 1,T], inv_freq [C/2]"""
    b = x.backend
    y = b.rope(x.data, positions, inv_freq, scale, interleaved)
    return Tensor.from_op(y, (x,), lambda dy: b.rope_backward(dy, positions, inv_freq, scale, interleaved))


def split_heads(qkv: Tensor, positions: Array, inv_freq: Array | None, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut one projection into the heads of q, k and v, and rotate q and k.   qkv [B,T,(Q+2G)*C] -> q [B,T,Q,C], k, v [B,T,G,C]"""
    b, qkv_data = qkv.backend, qkv.data
    outputs = b.split_heads(qkv_data, positions, inv_freq, heads=heads, groups=groups)
    shapes, dtype = [array.shape for array in outputs], qkv.dtype

    def backward(*gradients: Array | None) -> Array:
        dq, dk, dv = (b.xp.zeros(shape, dtype=dtype) if d is None else d for d, shape in zip(gradients, shapes, strict=True))
        return b.split_heads_backward(dq, dk, dv, positions, inv_freq)

    return Tensor.from_op(outputs, (qkv,), backward)


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, **options: Any) -> Tensor:
    """Scaled dot-product attention.   q [B,Tq,Q,C], k [B,Tk,G,C], v [B,Tk,G,Cv] -> [B,Tq,Q,Cv]; options of the kernel"""
    b, arrays = q.backend, (q.data, k.data, v.data)
    sink_data = None if sinks is None else sinks.data
    y, lse = b.attention(*arrays, sinks=sink_data, **options)

    def backward(dy: Array) -> tuple[Array, ...]:
        gradients = b.attention_backward(dy, *arrays, y, lse, sinks=sink_data, **options)
        return gradients[:3] if sink_data is None else gradients

    return Tensor.from_op(y, (q, k, v) if sinks is None else (q, k, v, sinks), backward)
