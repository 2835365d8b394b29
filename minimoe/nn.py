"""Modules: parameters with names, and the layers of a dense Transformer.

A Parameter is declared with its shape and how it starts, and gets its numbers when `init(seed)` is called on the whole: they are drawn
by the parameter's path, on the host, so they are the same on every backend and do not depend on the order of declaration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol, Self, TypeAlias

import numpy as np

from minimoe import ops
from minimoe.autograd import Tensor, current_backend, tensor
from minimoe.backend import Array, Backend
from minimoe.cache import KeyValueCache
from minimoe.config import RopeConfig
from minimoe.errors import CheckpointError, ConfigError
from minimoe.frequencies import frequencies
from minimoe.random import Rng, host_normal

COMPUTED = ("float32", "float64", "bfloat16")  # float16 would want its loss scaled

Role: TypeAlias = Literal["matrix", "embedding", "head", "vector"]


class Unfilled:
    """Stands for the numbers of a parameter until `init` has drawn them."""

    def __getattr__(self, name: str) -> Any:
        raise ConfigError("this parameter has no numbers yet: call .init(seed) on its module first")


class Source(Protocol):
    """Where the numbers of a parameter lie until they are asked for: in a file (`weights.py`)."""

    def get(self) -> Array:
        """All of them, as the backend's array; those of experts only where they were read."""


class Parameter(Tensor):
    """A trainable leaf: declared now, filled by `Module.init`, or read from its source when `data` is first asked for.

    Its role decides weight decay and which optimizer it suits.
    """

    __slots__ = ("declared", "held", "padding", "role", "source", "start", "std")
    source: Source | None

    def __init__(
        self, *shape: int, std: float = 0.0, start: float = 0.0, role: Role = "matrix", trainable: bool = True,
        padding: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(Unfilled(), None, requires_grad=trainable)  # type: ignore[arg-type]
        self.declared = shape
        self.std, self.start, self.role, self.padding = std, start, role, padding

    @property
    def shape(self) -> tuple[int, ...]:
        return self.declared

    @property
    def data(self) -> Array:
        return self.held if self.source is None else self.source.get()

    @data.setter
    def data(self, array: Array) -> None:
        self.held, self.source = array, None

    def read_from(self, source: Source, backend: Backend) -> None:
        """Take the numbers from there when they are needed."""
        self.backend, self.source, self.held, self.grad = backend, source, None, None

    def own(self) -> Array:
        """The numbers in an array that may be changed in place; from now on they are no longer those of a source."""
        if self.source is not None:
            self.data = self.backend.xp.asarray(self.source.get(), copy=True)
        return self.data

    def fill(self, name: str, seed: int, dtype: str, backend: Backend) -> None:
        """Draw the initial numbers of a parameter of this name."""
        values = np.full(self.declared, self.start, dtype=np.float64)
        if self.std:
            values += self.std * host_normal(values.size, seed, f"{name}.init").reshape(self.declared)
        if self.padding is not None:
            values[self.padding] = 0.0
        self.backend, self.grad = backend, None
        self.data = backend.from_host(values.astype(np.float64 if dtype == "float64" else np.float32))


class Module:
    """Parameters and modules as attributes (or in lists), found by name."""

    path = ""

    def children(self) -> Iterator[tuple[str, Module]]:
        """Modules directly below, by attribute name; those of a list as name.0, name.1, ..."""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list) and value and isinstance(value[0], Module):
                yield from ((f"{name}.{i}", module) for i, module in enumerate(value))

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below, by path."""
        yield prefix, self
        for name, module in self.children():
            yield from module.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_state(self) -> Iterator[tuple[str, Parameter]]:
        """Parameters and buffers by name; one that is tied stands once, under its first name."""
        seen: set[int] = set()
        for path, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Parameter) and id(value) not in seen:
                    seen.add(id(value))
                    yield (f"{path}.{name}" if path else name), value

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Trainable parameters by name."""
        return ((name, p) for name, p in self.named_state() if p.requires_grad)

    def parameters(self) -> list[Parameter]:
        """Trainable parameters, in the order of declaration."""
        return [p for _, p in self.named_parameters()]

    def init(self, seed: int = 0, dtype: str = "float32", backend: Backend | None = None) -> Self:
        """Fill every parameter below, each drawn by (seed, its path); gives the module itself.

        With bfloat16 parameters, gradients and moments are float32, and each layer rounds its weights to what it computes in.
        """
        backend = self.prepare(dtype, backend)
        for name, parameter in self.named_state():
            parameter.fill(name, seed, dtype, backend)
        return self

    def prepare(self, dtype: str, backend: Backend | None) -> Backend:
        """All of `init` but the numbers of parameters; gives the backend."""
        backend = backend or current_backend()
        if dtype not in COMPUTED:
            raise ConfigError(f"dtype {dtype!r}: models compute in {', '.join(COMPUTED)}")
        if dtype not in backend.dtypes:
            raise ConfigError(f"backend {backend.name} has no {dtype}: it has {', '.join(backend.dtypes)}")
        for path, module in self.named_modules():
            module.path = path
            module.setup(backend, dtype)
        return backend

    def setup(self, backend: Backend, dtype: str) -> None:
        """Make constants that are no parameters; called by `prepare`."""

    def state_dict(self) -> dict[str, Array]:
        """Every parameter and buffer as the backend's array, by name."""
        return {name: parameter.data for name, parameter in self.named_state()}

    def load_state_dict(self, arrays: Mapping[str, Any]) -> None:
        """Take over arrays (of any library) by name, in place. Raises CheckpointError naming what is missing, unexpected or misshapen."""
        state = dict(self.named_state())
        missing, unexpected = sorted(set(state) - set(arrays)), sorted(set(arrays) - set(state))
        if missing or unexpected:
            raise CheckpointError(
                f"state does not fit the model: missing {missing[:5] or 'nothing'}, unexpected {unexpected[:5] or 'nothing'}"
            )
        for name, parameter in state.items():
            if tuple(arrays[name].shape) != parameter.shape:
                raise CheckpointError(f"{name}: shape {tuple(arrays[name].shape)}, the model has {parameter.shape}")
        for name, parameter in state.items():
            value = arrays[name]
            if not isinstance(value, type(parameter.data)):
                value = tensor(value, backend=parameter.backend).data
            parameter.own()[...] = parameter.backend.xp.astype(value, parameter.data.dtype)


def lowered(parameter: Tensor, x: Tensor) -> Tensor:
    """A parameter in the dtype that x is computed in."""
    return parameter if parameter.dtype == x.dtype else ops.astype(parameter, x.dtype)


def lowered_or_none(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """The same for one that a layer may lack."""
    return None if parameter is None else lowered(parameter, x)


# ---- layers ---------------------------------------------------------------------------------------------------------------------------


class Linear(Module):
    """y = x W^T + b.   weight [out, in], bias [out]"""

    def __init__(self, d_in: int, d_out: int, bias: bool = False, std: float = 0.02, role: Role = "matrix") -> None:
        self.weight = Parameter(d_out, d_in, std=std, role=role)
        self.bias = Parameter(d_out, role="vector") if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return ops.linear(x, lowered(self.weight, x), lowered_or_none(self.bias, x))


class Embedding(Module):
    """A row for each id.   weight [V,D]"""

    def __init__(self, vocab_size: int, d_model: int, std: float = 0.02, padding: int | None = None) -> None:
        self.weight = Parameter(vocab_size, d_model, std=std, role="embedding", padding=padding)
        self.padding = padding

    def __call__(self, ids: Array) -> Tensor:
        return ops.embedding(ids, self.weight, self.padding)


class Norm(Module):
    """RMS norm (weight) or layer norm (weight, and bias if asked) over the last axis."""

    def __init__(self, width: int, kind: str = "rms", eps: float = 1e-5, bias: bool = False) -> None:
        self.kind, self.eps = kind, eps
        self.weight = Parameter(width, start=1.0, role="vector")
        self.bias = Parameter(width, role="vector") if bias and kind == "layer" else None

    def __call__(self, x: Tensor) -> Tensor:
        weight = lowered(self.weight, x)
        if self.kind == "rms":
            return ops.rms_norm(x, weight, self.eps)
        return ops.layer_norm(x, weight, lowered_or_none(self.bias, x), self.eps)

    def after_add(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """x + delta, and the norm of that."""
        return ops.add_norm(x, delta, lowered(self.weight, x), lowered_or_none(self.bias, x), self.eps, self.kind)


class Dropout(Module):
    """Zero a share of the numbers in training, and scale up the rest."""

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
        w_up, w_down = lowered(up.weight, x), lowered(self.down_proj.weight, x)
        up_bias, down_bias = lowered_or_none(up.bias, x), lowered_or_none(self.down_proj.bias, x)
        return ops.ffn(x, w_up, w_down, up_bias, down_bias, self.activation)


class Attention(Module):
    """Attention with grouped heads: one product makes all of q, k, v, another joins the heads again.   [B,T,D] -> [B,T,D]

    With a cache, keys and values of earlier calls are constants: no gradient goes back through them.
    """

    def __init__(
        self, d_model: int, n_heads: int, n_kv_heads: int | None = None, head_dim: int | None = None, *, causal: bool = True,
        window: int = 0, position: str = "rope", rope_theta: float = 10000.0, rope: RopeConfig | None = None, max_seq_len: int = 0,
        qk_norm: str = "none", norm_eps: float = 1e-5, bias: bool = False, sinks: bool = False, dropout: float = 0.0, std: float = 0.02,
        out_std: float | None = None,
    ) -> None:  # fmt: skip
        """`sinks`: a learned score a head that takes weight and gives no value. `rope`, `max_seq_len`: as in frequencies.py"""
        self.heads, self.groups = n_heads, n_kv_heads or n_heads
        self.width = self.v_width = head_dim or d_model // n_heads
        self.scale = 1.0 / math.sqrt(self.width)
        if self.heads % self.groups:
            raise ConfigError(f"attention: n_heads ({self.heads}) must be a multiple of n_kv_heads ({self.groups})")
        self.causal, self.window, self.dropout = causal, window, dropout
        self.theta, self.rope, self.max_seq_len = rope_theta if position == "rope" else 0.0, rope, max_seq_len
        self.turned, self.interleaved = self.width, False
        self.sinks = Parameter(n_heads, role="vector") if sinks else None
        self.qkv_proj = Linear(d_model, (self.heads + 2 * self.groups) * self.width, bias, std)
        self.o_proj = Linear(self.heads * self.width, d_model, bias, std if out_std is None else out_std)
        self.norm_over = qk_norm
        if qk_norm != "none":
            each = qk_norm == "head"
            self.q_norm = Norm(self.width if each else self.heads * self.width, "rms", norm_eps)
            self.k_norm = Norm(self.width if each else self.groups * self.width, "rms", norm_eps)

    def setup(self, backend: Backend, dtype: str) -> None:
        if self.theta:
            angles, self.rope_scale = frequencies(self.theta, self.turned, self.rope, self.max_seq_len)
            self.inv_freq = backend.from_host(angles.astype(np.float64 if dtype == "float64" else np.float32))

    def __call__(
        self, x: Tensor, positions: Array, valid: Array | None = None, rng: Rng | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """x [B,T,D], positions [B or 1,T] int32, valid [B,T] bool: keys that count (with a cache, it knows which)"""
        b, t, _ = x.shape
        q, k, v = self._project(x, b, t, positions)
        k_positions = positions
        if cache is not None:
            k_seen, v_seen, k_positions, valid = cache.append(k.data, v.data)
            k, v = Tensor(k_seen, x.backend), Tensor(v_seen, x.backend)
        dropout = self.dropout if rng is not None else 0.0
        y = ops.attention(
            q, k, v, lowered_or_none(self.sinks, q), scale=self.scale, causal=self.causal, window=self.window, q_pos=positions,
            k_pos=k_positions, k_valid=valid, dropout=dropout,
            rng=rng.draw(self.path, "attention_dropout") if rng is not None and dropout else None,
        )  # fmt: skip
        return self.o_proj(y.reshape(b, t, self.heads * self.v_width))

    def _project(self, x: Tensor, b: int, t: int, positions: Array) -> tuple[Tensor, Tensor, Tensor]:
        """-> q [B,T,Q,C], k, v [B,T,G,C], q and k normalised where asked, and turned"""
        inv_freq = self.inv_freq if self.theta else None
        if self.norm_over == "none" and (inv_freq is None or self.rope_scale == 1.0):
            return ops.split_heads(self.qkv_proj(x), positions, inv_freq, self.heads, self.groups)
        rows, groups, c = self.heads * self.width, self.groups * self.width, self.width
        q, k, v = ops.split(self.qkv_proj(x), (rows, groups, groups))
        if self.norm_over == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.reshape(b, t, self.heads, c), k.reshape(b, t, self.groups, c), v.reshape(b, t, self.groups, c)
        if self.norm_over == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if inv_freq is not None:
            q, k = self._turn(q, positions), self._turn(k, positions)
        return q, k, v

    def make_cache(self, batch: int, capacity: int, dtype: Any, backend: Backend) -> KeyValueCache:
        """Buffers for so many columns, or for its window's where that is less."""
        rolls = self.causal and 0 < self.window <= capacity
        slots = self.window if rolls else capacity
        return KeyValueCache(batch, slots, self.groups, (self.width, self.v_width), dtype, backend, rolls)

    def _turn(self, x: Tensor, positions: Array) -> Tensor:
        """Rotary positions.   [B,T,heads,C], whose first coordinates are turned"""
        return ops.rope(x, positions, self.inv_freq, self.rope_scale, self.interleaved)
