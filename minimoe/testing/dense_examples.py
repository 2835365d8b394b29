"""Inputs for comparing the kernels of a dense Transformer with their references, at the sizes where kernels break."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from minimoe.backend import Backend, load
from minimoe.reference.random import Draw
from minimoe.testing.conformance import Wide

Floats = npt.NDArray[np.float64]


def _same(outputs: Any) -> Any:
    return outputs


@dataclass(frozen=True)
class Example:
    """One call of a kernel. `call` (default: the method of that name) returns what is compared, after `trim` on the host."""

    label: str
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    call: Callable[..., Any] | None = None
    trim: Callable[[Any], Any] = _same
    additions: int = 0  # how many, one after the other, a term of its longest sum may pass through; 0: few
    exact: bool = False  # True: equal to the last bit, for numbers that are only copied or left alone


Examples = Callable[[], Iterator[Example]]

_others: ContextVar[bool] = ContextVar("others", default=False)


@contextmanager
def other_numbers() -> Iterator[None]:
    """Within the block, examples keep their shapes and options and have other numbers."""
    token = _others.set(True)
    try:
        yield
    finally:
        _others.reset(token)


def generator(*seed: int) -> np.random.Generator:
    """Return the source of an example's random numbers."""
    return np.random.default_rng([*seed, 1] if _others.get() else seed)


def floats(seed: int, *shape: int) -> Floats:
    return np.asarray(generator(seed, *shape).standard_normal(shape))


def another(draw: Draw) -> Draw:
    """Return the draw, or within `other_numbers()` that of the next step."""
    return draw._replace(step=draw.step + 1) if _others.get() else draw


def reference() -> Backend:
    """Return a backend of the references on NumPy."""
    return load("numpy")


# ---- norm ------------------------------------------------------------------------------------------------------------------------------

EPS = 1e-5


def norm_inputs() -> Iterator[tuple[str, Floats, Floats, Floats]]:
    for n, d in [(1, 1), (3, 31), (31, 32), (33, 33), (2, 257), (0, 8)]:
        yield f"x [{n},{d}]", floats(1, n, d) + 0.5, 1.0 + 0.1 * floats(2, d), floats(3, n, d)
    yield "x [2,3,33]", floats(1, 2, 3, 33), floats(2, 33), floats(3, 2, 3, 33)
    yield "x [2,32], all zero", np.zeros((2, 32)), floats(2, 32), floats(3, 2, 32)


def rms_norm() -> Iterator[Example]:
    for label, x, w, _ in norm_inputs():
        yield Example(label, (x, w, EPS))


def rms_norm_backward() -> Iterator[Example]:
    for label, x, w, dy in norm_inputs():
        _, rstd = reference().rms_norm(x, w, EPS)
        yield Example(label, (dy, x, w, Wide(rstd)))


def far_from_zero() -> tuple[str, Floats, Floats, Floats]:
    """Rows whose mean is far above their deviation, where mean(x^2) - mean(x)^2 cancels; whole numbers, exact in every dtype."""
    return "x [3,33], far from zero", 100.0 + np.round(1.5 * floats(1, 3, 33)), 1.0 + 0.1 * floats(2, 33), np.round(floats(3, 3, 33))


def layer_norm() -> Iterator[Example]:
    for label, x, w, _ in (*norm_inputs(), far_from_zero()):
        yield Example(label, (x, w, floats(4, x.shape[-1]), EPS))
        yield Example(f"{label}, no bias", (x, w, None, EPS))


def layer_norm_backward() -> Iterator[Example]:
    for label, x, w, dy in (*norm_inputs(), far_from_zero()):
        _, mean, rstd = reference().layer_norm(x, w, None, EPS)
        yield Example(label, (dy, x, w, Wide(mean), Wide(rstd)))


@dataclass(frozen=True)
class Forward:
    """The forward half of a composite kernel: returns its outputs, without what it saves."""

    kernel: str
    options: tuple[Any, ...] = ()

    def __call__(self, backend: Backend, *args: Any) -> Any:
        return getattr(backend, self.kernel)(*args, *self.options)[0]


@dataclass(frozen=True)
class BothHalves:
    """Both halves of a composite kernel. The first `n_args` arguments go to the forward; the others, and what it saved, to the backward."""

    kernel: str
    n_args: int
    options: tuple[Any, ...] = ()

    def __call__(self, backend: Backend, *args: Any, **out: Any) -> Any:
        return self.backward(backend, args, self.forward(backend, args)[1], **out)

    def forward(self, backend: Backend, args: tuple[Any, ...]) -> tuple[Any, Any]:
        """-> outputs, saved"""
        outputs, saved = getattr(backend, self.kernel)(*args[: self.n_args], *self.options)
        return outputs, saved

    def backward(self, backend: Backend, args: tuple[Any, ...], saved: Any, **out: Any) -> Any:
        """Return the gradients; `out` holds `out` and `accumulate` if they are given."""
        return getattr(backend, f"{self.kernel}_backward")(*args[self.n_args :], saved, *self.options, **out)


def outputs_of(kernel: str, *options: Any) -> Forward:
    return Forward(kernel, options)


def gradients_of(kernel: str, n_args: int, *options: Any) -> BothHalves:
    return BothHalves(kernel, n_args, options)


def add_rms_norm() -> Iterator[Example]:
    for label, x, w, dy in norm_inputs():
        yield Example(label, (x, dy, w, EPS), call=outputs_of("add_rms_norm"))


def add_rms_norm_backward() -> Iterator[Example]:
    call = gradients_of("add_rms_norm", 4)
    for label, x, w, dy in norm_inputs():
        yield Example(label, (x, floats(5, *x.shape), w, EPS, floats(6, *x.shape), dy), call=call)
        yield Example(f"{label}, dtotal None", (x, floats(5, *x.shape), w, EPS, None, dy), call=call)


def add_layer_norm() -> Iterator[Example]:
    for label, x, w, dy in (*norm_inputs(), far_from_zero()):
        yield Example(label, (x, dy, w, floats(4, x.shape[-1]), EPS), call=outputs_of("add_layer_norm"))
        yield Example(f"{label}, no bias", (x, dy, w, None, EPS), call=outputs_of("add_layer_norm"))


def add_layer_norm_backward() -> Iterator[Example]:
    call = gradients_of("add_layer_norm", 5)
    for label, x, w, dy in norm_inputs():
        bias = floats(4, x.shape[-1])
        yield Example(label, (x, floats(5, *x.shape), w, bias, EPS, floats(6, *x.shape), dy), call=call)
        yield Example(f"{label}, dtotal None", (x, floats(5, *x.shape), w, bias, EPS, None, dy), call=call)


# ---- activation, rope, linear -----------------------------------------------------------------------------------------------------------


def activation_inputs(factor: int = 1) -> Iterator[tuple[str, Floats, Floats]]:
    for n, h in [(1, 1), (31, 32), (33, 31), (2, 33), (0, 4)]:
        yield f"x [{n},{factor * h}]", 3.0 * floats(1, n, factor * h), floats(2, n, h)
    edge = np.array([[2.0, -2.0, 2.0, -2.0, 0.0, 0.0]])  # where the clipped form begins to clip, and relu to pass
    yield f"x [1,{6 * factor}], at the limits", np.concatenate([edge, np.roll(edge, 1)], axis=1)[:, : 6 * factor], floats(2, 1, 6)
    large = np.array([[-100.0, -30.0, 0.0, 30.0, 100.0, 8.0]])
    yield f"x [1,{6 * factor}], large", np.tile(large, (1, factor)), floats(2, 1, 6)


def swiglu() -> Iterator[Example]:
    for label, x, _ in activation_inputs(2):
        for limit in (0.0, 2.0):
            yield Example(f"{label}, limit {limit}", (x, limit))


def swiglu_backward() -> Iterator[Example]:
    for label, x, dy in activation_inputs(2):
        for limit in (0.0, 2.0):
            yield Example(f"{label}, limit {limit}", (dy, x, limit))


def gelu() -> Iterator[Example]:
    for label, x, _ in activation_inputs():
        for tanh in (False, True):
            yield Example(f"{label}, tanh {tanh}", (x, tanh))


def gelu_backward() -> Iterator[Example]:
    for label, x, dy in activation_inputs():
        for tanh in (False, True):
            yield Example(f"{label}, tanh {tanh}", (dy, x, tanh))


def relu() -> Iterator[Example]:
    for label, x, _ in activation_inputs():
        yield Example(label, (x,))


def relu_backward() -> Iterator[Example]:
    for label, x, dy in activation_inputs():
        yield Example(label, (dy, x))


def rope() -> Iterator[Example]:
    for b, t, heads, c, pairs in [(1, 1, 1, 2, 1), (2, 31, 3, 8, 4), (2, 33, 1, 6, 2), (1, 32, 2, 34, 17)]:
        inv_freq = Wide(10.0 ** -np.linspace(0.0, 2.0, pairs))
        rows = np.stack([np.arange(t) + 3 * i for i in range(b)]).astype(np.int32)
        for interleaved in (False, True):
            for scale, positions in ((1.0, rows[:1]), (1.25, rows)):
                label = f"x [{b},{t},{heads},{c}], {pairs} pairs, interleaved {interleaved}, scale {scale}"
                yield Example(label, (floats(1, b, t, heads, c), positions, inv_freq, scale, interleaved))
    late = np.array([[2_049, 5_003, 33_001]], dtype=np.int32)
    exact = Wide(np.array([1.0, 0.25]))  # powers of two, so that the angles have no rounding
    yield Example("x [1,3,2,4], 2 pairs, late positions", (floats(1, 1, 3, 2, 4), late, exact))


def heads_inputs() -> Iterator[tuple[str, tuple[int, ...], Any, Any]]:
    for b, t, heads, groups, c in [(1, 1, 1, 1, 2), (2, 31, 4, 2, 8), (2, 33, 3, 1, 6)]:
        positions = np.stack([np.arange(t) + 3 * i for i in range(b)]).astype(np.int32)
        for inv_freq in (None, Wide(10.0 ** -np.linspace(0.0, 2.0, c // 2))):
            label = f"qkv [{b},{t},({heads}+2*{groups})*{c}], {'not rotated' if inv_freq is None else 'rotated'}"
            yield label, (b, t, heads, groups, c), positions, inv_freq


def split_heads() -> Iterator[Example]:
    for label, (b, t, heads, groups, c), positions, inv_freq in heads_inputs():
        qkv = floats(1, b, t, (heads + 2 * groups) * c)
        yield Example(label, (qkv, positions, inv_freq), {"heads": heads, "groups": groups})


def split_heads_backward() -> Iterator[Example]:
    for label, (b, t, heads, groups, c), positions, inv_freq in heads_inputs():
        gradients = (floats(i, b, t, n, c) for i, n in enumerate((heads, groups, groups)))
        yield Example(label, (*gradients, positions, inv_freq))


LINEAR = [((1,), 1, 1), ((31,), 33, 32), ((33,), 31, 1), ((2, 3), 32, 33), ((0,), 4, 3)]


def linear() -> Iterator[Example]:
    for lead, i, o in LINEAR:
        x, w = floats(1, *lead, i), floats(2, o, i)
        yield Example(f"x {[*lead, i]}, weight [{o},{i}]", (x, w, floats(3, o)))
        yield Example(f"x {[*lead, i]}, weight [{o},{i}], no bias", (x, w, None))


def linear_dx() -> Iterator[Example]:
    for lead, i, o in LINEAR:
        yield Example(f"dy {[*lead, o]}, weight [{o},{i}]", (floats(1, *lead, o), floats(2, o, i)))


def linear_dw() -> Iterator[Example]:
    for lead, i, o in LINEAR:
        yield Example(f"dy {[*lead, o]}, x {[*lead, i]}", (floats(1, *lead, o), floats(2, *lead, i)))


def linear_db() -> Iterator[Example]:
    for lead, _, o in LINEAR:
        yield Example(f"dy {[*lead, o]}", (floats(1, *lead, o),))


# ---- attention --------------------------------------------------------------------------------------------------------------------------


def attention_inputs() -> Iterator[tuple[str, tuple[Floats, Floats, Floats], dict[str, Any]]]:
    shapes = [(1, 1, 1, 1, 1, 4, 4), (2, 31, 31, 4, 2, 8, 8), (1, 32, 32, 2, 2, 33, 5), (2, 33, 33, 3, 1, 8, 8), (2, 3, 33, 4, 2, 8, 8)]
    for b, tq, tk, q, g, c, cv in shapes:
        arrays = floats(1, b, tq, q, c), floats(2, b, tk, g, c), floats(3, b, tk, g, cv)
        k_pos = np.arange(tk, dtype=np.int32)[None]
        base = {"scale": c**-0.5, "causal": True, "q_pos": k_pos[:, tk - tq :], "k_pos": k_pos}
        label = f"q [{b},{tq},{q},{c}], k [{b},{tk},{g},{c}], v [..,{cv}]"
        yield f"{label}, causal", arrays, base
        yield f"{label}, full", arrays, {**base, "causal": False}
        yield f"{label}, window 5", arrays, {**base, "window": 5}
        yield f"{label}, window 3 both ways", arrays, {**base, "window": 3, "causal": False}
        valid = np.arange(tk)[None] < np.array([[tk], [max(tk - 4, 0)]])[:b]
        yield f"{label}, padding, not causal", arrays, {**base, "causal": False, "k_valid": valid}
        left = np.arange(tk)[None] >= np.array([[0], [min(2, tk)]])[:b]
        yield f"{label}, left padding: rows without a key", arrays, {**base, "k_valid": left}
        shifted = np.concatenate([k_pos, np.roll(k_pos, 2, axis=1)])[:b]
        yield f"{label}, a rolling cache's positions", arrays, {**base, "k_pos": shifted, "window": 7}
        own = np.concatenate([k_pos, np.maximum(k_pos - 2, 0)])[:b]  # of a batch that is padded on the left
        yield f"{label}, positions of each sequence", arrays, {**base, "q_pos": own[:, tk - tq :], "k_pos": own, "k_valid": left}
        yield f"{label}, sinks", arrays, {**base, "sinks": floats(4, q), "k_valid": left}
        yield f"{label}, dropout", arrays, {**base, "dropout": 0.25, "rng": another(Draw(7, 11, 2, 3))}
    yield from far_scores()


def far_scores() -> Iterator[tuple[str, tuple[Floats, Floats, Floats], dict[str, Any]]]:
    """Scores and sinks so far apart that e^(their difference) overflows; all are whole numbers, which every dtype holds."""
    (b, t, q, g, c, cv), steps = (2, 6, 4, 2, 4, 3), np.arange(6, dtype=np.int32)[None]
    query, key = np.clip(np.round(8.0 * floats(1, b, t, q, c)), -24, 24), np.clip(np.round(4.0 * floats(2, b, t, g, c)), -12, 12)
    options = {"scale": 0.5, "causal": True, "q_pos": steps, "k_pos": steps}
    for what, sinks in [("scores", None), ("scores and sinks", np.array([1024.0, -1024.0, 48.0, 0.0]))]:
        label = f"q [{b},{t},{q},{c}], k [{b},{t},{g},{c}], v [..,{cv}], {what} far apart"
        yield label, (query, key, floats(3, b, t, g, cv)), options if sinks is None else {**options, "sinks": sinks}


def attention() -> Iterator[Example]:
    for label, arrays, options in attention_inputs():
        yield Example(label, arrays, options)


def attention_backward() -> Iterator[Example]:
    for label, (q, k, v), options in attention_inputs():
        y, lse = reference().attention(q, k, v, **options)
        yield Example(label, (floats(5, *y.shape), q, k, v, y, Wide(lse)), options)


DENSE: dict[str, Examples] = {
    "rms_norm": rms_norm, "rms_norm_backward": rms_norm_backward, "layer_norm": layer_norm, "layer_norm_backward": layer_norm_backward,
    "add_rms_norm": add_rms_norm, "add_rms_norm_backward": add_rms_norm_backward, "add_layer_norm": add_layer_norm,
    "add_layer_norm_backward": add_layer_norm_backward, "swiglu": swiglu, "swiglu_backward": swiglu_backward, "gelu": gelu,
    "gelu_backward": gelu_backward, "relu": relu, "relu_backward": relu_backward, "rope": rope, "rope_backward": rope,
    "split_heads": split_heads, "split_heads_backward": split_heads_backward, "linear": linear,
    "linear_dx": linear_dx, "linear_dw": linear_dw, "linear_db": linear_db, "attention": attention,
    "attention_backward": attention_backward,
}  # fmt: skip
