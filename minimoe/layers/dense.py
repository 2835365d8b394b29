"""The layers of a dense Transformer: linear, embedding, norm, dropout and feed-forward."""

from __future__ import annotations

from minimoe.backend import Array
from minimoe.engine import ops
from minimoe.engine.random import Rng
from minimoe.engine.tensor import Tensor
from minimoe.layers.low_rank import Adapter, adapted
from minimoe.layers.module import Module, Parameter, Role, cast_like, cast_like_or_none


class Linear(Module):
    """y = x W^T + b.   weight [out, in], bias [out]"""

    def __init__(self, d_in: int, d_out: int, bias: bool = False, std: float = 0.02, role: Role = "matrix") -> None:
        self.weight = Parameter(d_out, d_in, std=std, role=role)
        self.bias = Parameter(d_out, role="vector") if bias else None
        self.lora: Adapter | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight_for(x), cast_like_or_none(self.bias, x))

    def weight_for(self, x: Tensor) -> Tensor:
        """Return the weight, with its adapter if it has one, in the dtype of x."""
        return cast_like(adapted(self.weight, self.lora), x)


class Embedding(Module):
    """Look up a row of the table for each id.   weight [V,D]"""

    def __init__(self, vocab_size: int, d_model: int, std: float = 0.02, padding: int | None = None) -> None:
        self.weight = Parameter(vocab_size, d_model, std=std, role="embedding", padding=padding)
        self.padding = padding

    def __call__(self, ids: Array) -> Tensor:
        return ops.embedding(ids, self.weight, self.padding)


class Norm(Module):
    """RMS norm (with a weight) or layer norm (with a weight, and optionally a bias) over the last axis."""

    def __init__(self, width: int, kind: str = "rms", eps: float = 1e-5, bias: bool = False) -> None:
        self.kind, self.eps = kind, eps
        self.weight = Parameter(width, start=1.0, role="vector")
        self.bias = Parameter(width, role="vector") if bias and kind == "layer" else None

    def __call__(self, x: Tensor) -> Tensor:
        weight = cast_like(self.weight, x)
        if self.kind == "rms":
            return ops.rms_norm(x, weight, self.eps)
        return ops.layer_norm(x, weight, cast_like_or_none(self.bias, x), self.eps)

    def after_add(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + delta and its norm."""
        return ops.add_norm(x, delta, cast_like(self.weight, x), cast_like_or_none(self.bias, x), self.eps, self.kind)


class Dropout(Module):
    """Set a share of the numbers to zero in training, and scale up the others."""

    def __init__(self, rate: float, purpose: str) -> None:
        self.rate, self.purpose = rate, purpose

    def __call__(self, x: Tensor, rng: Rng | None) -> Tensor:
        if not self.rate or rng is None:
            return x
        return ops.dropout(x, self.rate, rng.draw(self.path, self.purpose))


class FeedForward(Module):
    """down(activation(up(x))); swiglu's up holds both halves, the gate first.   [...,D] -> [...,D]"""

    def __init__(
        self, d_model: int, d_hidden: int, activation: str = "swiglu", bias: bool = False, std: float = 0.02, out_std: float | None = None
    ) -> None:
        self.activation = activation
        up = Linear(d_model, 2 * d_hidden if activation == "swiglu" else d_hidden, bias, std)
        if activation == "swiglu":
            self.gate_up_proj = up
        else:
            self.up_proj = up
        self.down_proj = Linear(d_hidden, d_model, bias, std if out_std is None else out_std)

    def __call__(self, x: Tensor) -> Tensor:
        up = self.gate_up_proj if self.activation == "swiglu" else self.up_proj
        w_up, w_down = up.weight_for(x), self.down_proj.weight_for(x)
        up_bias, down_bias = cast_like_or_none(up.bias, x), cast_like_or_none(self.down_proj.bias, x)
        return ops.ffn(x, w_up, w_down, up_bias, down_bias, self.activation)
