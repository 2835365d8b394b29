"""Examples of every differentiable operation, as functions of tensors with inputs, for checking gradients and comparing backends.

An example's function takes the backend (to make integer arrays on it) and its tensors. Values stay away from kinks (relu, max, clipping)
and the gaps of every top-k are far wider than a difference's step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from minimoe.backend import Array, Backend
from minimoe.engine import ops
from minimoe.engine.recompute import recompute
from minimoe.engine.tensor import Tensor
from minimoe.reference.gating import Rule
from minimoe.reference.random import Draw
from minimoe.testing.conformance import to_device
from minimoe.testing.dense_examples import Floats, attention_inputs, floats
from minimoe.testing.routed_examples import bias_of, expert_weights, rules, slot_ids, spaced


class OpExample(NamedTuple):
    """A call of an operation: `function(backend, *tensors)` returns a tensor or a tuple of them."""

    op: str
    label: str
    function: Callable[..., Any]
    inputs: tuple[Floats, ...]


def away(seed: int, *shape: int) -> Floats:
    """Return values at least 0.1 away from zero."""
    x = floats(seed, *shape)
    return np.asarray(np.sign(x) * (0.1 + np.abs(x)), dtype=np.float64)


def distinct(seed: int, *shape: int) -> Floats:
    """Return values at least 0.05 away from each other and from zero."""
    size = int(np.prod(shape))
    return np.asarray((np.random.default_rng(seed).permutation(size).reshape(shape) - size / 2 + 0.5) * 0.1, dtype=np.float64)


Functions = dict[str, tuple[Callable[..., Any], Callable[..., Floats]]]

ELEMENTWISE: Functions = {
    "exp": (ops.exp, floats), "log": (ops.log, lambda s, *shape: np.asarray(0.5 + np.abs(floats(s, *shape)))), "tanh": (ops.tanh, floats),
    "sigmoid": (ops.sigmoid, floats), "softplus": (ops.softplus, floats), "gelu": (ops.gelu, floats),
    "gelu, tanh": (lambda x: ops.gelu(x, tanh=True), floats), "relu": (ops.relu, away), "cube": (lambda x: x**3.0, floats),
    "square root": (lambda x: (x * x + 1.0).sqrt(), floats), "negate": (lambda x: -x, floats),
    "1 / x, x - 1, 1 - x": (lambda x: (1.0 / x, x - 1.0, 1.0 - x), away), "x + x": (lambda x: x + x, floats),
    "x * x, used again": (lambda x: x * x * x + x.reshape(*x.shape) * 2.0, floats), "x / x^2": (lambda x: x / (x * x), away),
}  # fmt: skip


def elementwise() -> Iterator[OpExample]:
    for name, (function, make) in ELEMENTWISE.items():
        for shape in [(), (1,), (3, 31), (2, 0)]:
            yield OpExample(name, f"{list(shape)}", lambda b, x, f=function: f(x), (make(1, *shape),))


def arithmetic() -> Iterator[OpExample]:
    pairs = [((3, 5), (3, 5)), ((3, 5), (5,)), ((3, 1), (1, 5)), ((), (2, 3)), ((2, 1, 3), (4, 1)), ((0, 3), (3,))]
    for sa, sb in pairs:
        for name, function in (("add", ops.add), ("subtract", ops.subtract), ("multiply", ops.multiply), ("divide", ops.divide)):
            yield OpExample(name, f"{list(sa)}, {list(sb)}", lambda b, x, y, f=function: f(x, y), (floats(1, *sa), away(2, *sb)))
        shape = np.broadcast_shapes(sa, sb)
        mask = np.random.default_rng(1).random(shape) < 0.5
        inputs = floats(1, *sa), floats(2, *sb)
        yield OpExample("where", f"{list(sa)}, {list(sb)}", lambda b, x, y, m=mask: ops.where(b.from_host(m), x, y), inputs)
    for sa, sb in [((3, 5), (5, 7)), ((2, 3, 5), (5, 1)), ((2, 1, 3, 4), (5, 4, 3)), ((0, 4), (4, 3)), ((31, 33), (33, 32))]:
        yield OpExample("matmul", f"{list(sa)}, {list(sb)}", lambda b, x, y: x @ y, (floats(1, *sa), floats(2, *sb)))
    yield OpExample("matmul", "x x^T, one input twice", lambda b, x: x @ x.T, (floats(1, 3, 4),))


def reductions() -> Iterator[OpExample]:
    for axis in (None, 0, -1, (0, 2), (1,)):
        for keep in (False, True):
            label = f"[2,3,5], axis {axis}, keepdims {keep}"
            yield OpExample("sum", label, lambda b, x, a=axis, k=keep: x.sum(a, k), (floats(1, 2, 3, 5),))
            yield OpExample("mean", label, lambda b, x, a=axis, k=keep: x.mean(a, k), (floats(1, 2, 3, 5),))
            yield OpExample("max", label, lambda b, x, a=axis, k=keep: x.max(a, k), (distinct(1, 2, 3, 5),))
    yield OpExample("sum", "[0,3], axis 0", lambda b, x: x.sum(0) + 1.0, (floats(1, 0, 3),))
    for shape in [(1,), (3, 31), (2, 3, 4), (0, 3)]:
        yield OpExample("softmax", f"{list(shape)}", lambda b, x: ops.softmax(x), (floats(1, *shape),))
        yield OpExample("logsumexp", f"{list(shape)}", lambda b, x: ops.logsumexp(x), (floats(1, *shape),))


def shapes() -> Iterator[OpExample]:
    x, y = floats(1, 3, 4), floats(2, 3, 4)
    moves: dict[str, Callable[[Tensor], Any]] = {
        "reshape": lambda t: t.reshape(2, 6) * 2.0, "permute": lambda t: t.permute(1, 0),
        "broadcast_to": lambda t: ops.broadcast_to(t, (2, 3, 4)),
        "getitem: a row": lambda t: t[1], "getitem: slices": lambda t: t[::2, 1:3], "getitem: None, ...": lambda t: t[None, ..., -1],
        "getitem: rows": lambda t: t[[0, 2, 0, 0]], "getitem: [2,2] rows": lambda t: t[np.array([[0, 1], [1, 1]])],
        "non-contiguous": lambda t: ops.exp(t.T[1:, ::2]), "reused": lambda t: t.reshape(4, 3) @ t + t.reshape(12)[:4],
        "recompute": lambda t: recompute(lambda u: (ops.exp(u) * u, u.sum()), t),
    }  # fmt: skip
    for name, move in moves.items():
        yield OpExample(name.partition(":")[0], f"[3,4], {name}", lambda b, t, f=move: f(t), (x,))
    for axis in (0, 1, -1):
        yield OpExample("concat", f"axis {axis}", lambda b, s, t, a=axis: ops.concat([s, t, s], a), (x, y))
    yield OpExample("split", "[3,4] in 1, 2 and 1", lambda b, s: ops.split(s, (1, 2, 1)), (x,))
    yield OpExample("split", "one part unused", lambda b, s: ops.split(s, (1, 3))[1], (x,))
    yield OpExample("stack", "[3,4] twice", lambda b, s, t: ops.stack([s, t]), (x, y))


def layers() -> Iterator[OpExample]:
    for lead, i, o in [((1,), 1, 1), ((31,), 33, 5), ((2, 3), 4, 7), ((0,), 3, 2)]:
        label, x, w = f"x {[*lead, i]}, weight [{o},{i}]", floats(1, *lead, i), floats(2, o, i)
        yield OpExample("linear", label, lambda b, x, w: ops.linear(x, w), (x, w))
        yield OpExample("linear", f"{label}, bias", lambda b, *t: ops.linear(*t), (x, w, floats(3, o)))
        yield OpExample("rms_norm", label, lambda b, *t: ops.rms_norm(*t), (x + 0.3, floats(4, i)))
        if i == 1:
            continue
        yield OpExample("layer_norm", label, lambda b, *t: ops.layer_norm(*t), (x, floats(4, i)))
        yield OpExample("layer_norm", f"{label}, bias", lambda b, *t: ops.layer_norm(*t), (x, floats(4, i), floats(5, i)))
        for norm, bias in (("rms", False), ("layer", False), ("layer", True)):
            inputs = (x, floats(6, *x.shape), floats(4, i), *((floats(5, i),) if bias else ()))
            for use, pick in {"both": slice(0, 2), "total alone": slice(0, 1), "norm alone": slice(1, 2)}.items():

                def add_norm(b: Backend, *t: Tensor, norm: str = norm, pick: slice = pick) -> Any:
                    x, delta, w, *bias = t
                    return ops.add_norm(x, delta, w, bias[0] if bias else None, 1e-5, norm)[pick]

                yield OpExample("add_norm", f"{label}, {norm}, bias {bias}, {use}", add_norm, inputs)
    for activation, width in (("swiglu", 6), ("gelu", 3), ("gelu_tanh", 3), ("relu", 3)):
        yield OpExample("activate", activation, lambda b, x, a=activation: ops.activate(x, a), (away(1, 5, width),))
    for activation, rows in (("swiglu", 10), ("gelu", 5), ("gelu_tanh", 5)):

        def ffn(b: Backend, x: Tensor, up: Tensor, down: Tensor, *biases: Tensor, a: str = activation) -> Tensor:
            up_bias, down_bias = biases or (None, None)
            return ops.ffn(x, up, down, up_bias, down_bias, a)

        weights = (floats(1, 2, 3, 4), 0.5 * floats(2, rows, 4), 0.5 * floats(3, 4, 5))
        yield OpExample("ffn", activation, ffn, weights)
        yield OpExample("ffn", f"{activation}, biases", ffn, (*weights, floats(4, rows), floats(5, 4)))
    for lead, o, i, r in [((), 5, 4, 2), ((), 1, 1, 1), ((), 33, 31, 3), ((3,), 5, 4, 2), ((1,), 4, 6, 1), ((4,), 33, 31, 3)]:
        shapes = ((*lead, o, i), (*lead, r, i), (*lead, o, r))
        low_rank = OpExample(
            "low_rank", f"weight {list(shapes[0])}, rank {r}", lambda b, w, a, c: ops.low_rank(w, a, c, 1.5),
            tuple(floats(seed, *shape) for seed, shape in enumerate(shapes, start=1)),
        )  # fmt: skip
        yield low_rank
    yield OpExample("swiglu", "[5,8]", lambda b, x: ops.swiglu(x), (floats(1, 5, 8),))
    yield OpExample("swiglu", "[4,8], clipped at 0.8", lambda b, x: ops.swiglu(x, 0.8), (distinct(1, 4, 8),))
    yield OpExample("astype", "float32 and back", lambda b, x: ops.astype(x, x.dtype) * 2.0, (floats(1, 3, 4),))
    for rate in (0.0, 0.3):
        yield OpExample("dropout", f"[5,7], rate {rate}", lambda b, x, r=rate: ops.dropout(x, r, Draw(1, 2, 0, 3)), (floats(1, 5, 7),))


def frequencies(inv_freq: Floats, like: Tensor) -> Array:
    """Return angles in the precision of `like`, as a model has them: libraries differ in the last bit of a float32 cosine."""
    return like.backend.xp.astype(like.backend.from_host(inv_freq.astype(np.float32)), like.dtype)


def sequences() -> Iterator[OpExample]:
    for interleaved in (False, True):
        for c, pairs in ((8, 4), (7, 2)):

            def rope(b: Backend, x: Tensor, pairs: int = pairs, interleaved: bool = interleaved) -> Tensor:
                positions, inv_freq = np.arange(5, dtype=np.int32)[None] * 2, 10.0 ** -np.arange(pairs, dtype=np.float64)
                return ops.rope(x, b.from_host(positions), frequencies(inv_freq, x), 1.2, interleaved)

            yield OpExample("rope", f"[2,5,3,{c}], {pairs} pairs, interleaved {interleaved}", rope, (floats(1, 2, 5, 3, c),))
    for rotated in (False, True):

        def split_heads(b: Backend, qkv: Tensor, rotated: bool = rotated) -> tuple[Tensor, ...]:
            positions, inv_freq = np.arange(5, dtype=np.int32)[None] * 2, np.array([1.0, 0.1])
            return ops.split_heads(qkv, b.from_host(positions), frequencies(inv_freq, qkv) if rotated else None, 4, 2)

        yield OpExample("split_heads", f"[2,5,(4+2*2)*4], {'rotated' if rotated else 'not rotated'}", split_heads, (floats(1, 2, 5, 32),))
    for label, arrays, options in attention_inputs():
        if arrays[0].shape[1] > 31:
            continue

        def attention(b: Backend, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, options: Any = options) -> Tensor:
            given = {name: value for name, value in options.items() if name != "sinks"}
            return ops.attention(q, k, v, sinks, **to_device(b, given, "float32"))

        yield OpExample("attention", label, attention, (*arrays, options["sinks"]) if "sinks" in options else arrays)
    for shape, padding in (((3, 7), None), ((5,), 0), ((0,), None)):
        ids = np.random.default_rng(3).integers(0, 4, shape).astype(np.int32)
        if padding is not None:
            ids = ids % 3 + 1  # differences would see the padding row move, which has no gradient

        def embedding(b: Backend, w: Tensor, ids: Any = ids, padding: int | None = padding) -> Tensor:
            return ops.embedding(b.from_host(ids), w, padding) * 2.0

        yield OpExample("embedding", f"ids {list(shape)}, padding {padding}", embedding, (floats(1, 4, 3),))
    for targets in ([0, 4, 2], [-100, 4, -100], [-100] * 3, []):
        held = np.array(targets, dtype=np.int32)
        n = len(targets)

        def cross_entropy(b: Backend, z: Tensor, held: Any = held) -> Tensor:
            return ops.cross_entropy(z, b.from_host(held))[0]

        def linear_cross_entropy(b: Backend, x: Tensor, w: Tensor, held: Any = held) -> Tensor:
            return ops.linear_cross_entropy(x, w, b.from_host(held))[0]

        yield OpExample("cross_entropy", f"logits [{n},5], targets {targets}", cross_entropy, (floats(1, n, 5),))
        inputs = floats(1, n, 3), floats(2, 5, 3)
        yield OpExample("linear_cross_entropy", f"x [{n},3], targets {targets}", linear_cross_entropy, inputs)


def routing() -> Iterator[OpExample]:
    for name, make in rules().items():
        for n, e, k in [(1, 4, 1), (7, 8, 2), (5, 4, 4), (3, 1, 1)]:
            rule = make(k, e)
            if rule is None:
                continue
            for padding in (False, True):

                def gate(b: Backend, z: Tensor, rule: Rule = rule, n: int = n, e: int = e, padding: bool = padding) -> Any:
                    valid = b.from_host(np.arange(n) % 3 != 1) if padding else None
                    steps = bias_of(rule, e, 0.2)
                    bias = None if steps is None else b.xp.astype(b.from_host(steps.astype(np.float32)), z.dtype)
                    return ops.gate(z, bias, valid, rule)[:2]

                z = spaced(1, n, e) + 0.11 * np.arange(n)[:, None] * np.linspace(0.2, 1.0, e)
                yield OpExample("gate", f"{name}, [{n},{e}], K {k}, padding {padding}", gate, (z,))
    for padding in (False, True):

        def noisy(b: Backend, z: Tensor, h: Tensor, s: Tensor, padding: bool = padding) -> Tensor:
            return ops.noisy_load(z, h, s, b.from_host(np.arange(7) % 3 != 1) if padding else None, 2)

        arrays = floats(1, 7, 5), spaced(2, 7, 5), 0.5 + np.abs(floats(3, 7, 5))
        yield OpExample("noisy_load", f"[7,5], K 2, padding {padding}", noisy, arrays)

        def importance(b: Backend, w: Tensor, padding: bool = padding) -> Tensor:
            ids = b.from_host(slot_ids(7, 5, 2, "spread"))
            return ops.expert_sum(w, ids, b.from_host(np.arange(7) % 3 != 1) if padding else None, 5)

        yield OpExample("expert_sum", f"[7,2], padding {padding}", importance, (floats(1, 7, 2),))
    yield from expert_layers()


def expert_layers() -> Iterator[OpExample]:
    plans = [("spread", 9, 4, 2), ("one expert", 9, 4, 1), ("empty experts", 9, 4, 2), ("spread", 5, 1, 1), ("capacity", 9, 4, 2)]
    for activation, bias in [("swiglu", False), ("swiglu", True), ("gelu", True), ("gelu_tanh", False)]:
        for kind, n, e, k in plans:

            def moe(b: Backend, x: Tensor, w: Tensor, *experts: Any, a: str = activation, case: Any = (kind, n, e, k)) -> Any:
                kind, n, e, k = case
                full = kind == "capacity"
                valid, capacity = (b.from_host(np.arange(n) % 5 != 2), 2) if full else (None, None)
                plan = b.route(b.from_host(slot_ids(n, e, k, kind)), w.data, valid, n_experts=e, rows=n * k, capacity=capacity)
                up, down, up_bias, down_bias = experts if len(experts) == 4 else (*experts, None, None)
                return ops.moe_ffn(x, w, plan, up, down, up_bias, down_bias, a)

            weights = [array for array in expert_weights(e, 3, 4, activation, bias) if array is not None]
            label = f"x [{n},3], {e} experts, K {k}, {activation}, bias {bias}, {kind}"
            yield OpExample("moe_ffn", label, moe, (floats(8, n, 3), 0.5 + np.abs(floats(9, n, k)), *weights))


def op_examples() -> list[OpExample]:
    """Return examples of every operation of `minimoe/engine/ops/`, with its corner cases."""
    groups = (elementwise, arithmetic, reductions, shapes, layers, sequences, routing)
    return [example for group in groups for example in group()]
