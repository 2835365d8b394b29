"""Examples drawn anew in every run, at realistic and odd sizes, to find what fixed small inputs cannot."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from minimoe.backend import Backend
from minimoe.reference.expert import ExpertWeights
from minimoe.reference.gating import Gate, Rule
from minimoe.reference.random import Draw
from minimoe.testing.conformance import Wide
from minimoe.testing.dense_examples import Example, gradients_of, outputs_of, reference
from minimoe.testing.kernels import Run
from minimoe.testing.routed_examples import trim_plan

EPS = 1e-5
TERMS = 8.0  # tolerances are for sums of up to a hundred terms; these have thousands


def rows(rng: np.random.Generator) -> Iterator[tuple[str, Example]]:
    for n, d in ((65, 4096), (515, 1021)):
        x, delta, dy = (rng.standard_normal((n, d)) for _ in range(3))
        w, bias = rng.standard_normal(d), rng.standard_normal(d)
        label = f"x [{n},{d}]"
        _, rstd = reference().rms_norm(x, w, EPS)
        yield "rms_norm", Example(label, (x, w, EPS))
        yield "rms_norm_backward", Example(label, (dy, x, w, Wide(rstd)))
        _, mean, rstd = reference().layer_norm(x, w, bias, EPS)
        yield "layer_norm", Example(label, (x, w, bias, EPS))
        yield "layer_norm_backward", Example(label, (dy, x, w, Wide(mean), Wide(rstd)))
        yield "add_rms_norm", Example(label, (x, delta, w, EPS), call=outputs_of("add_rms_norm"))
        yield "add_rms_norm_backward", Example(label, (x, delta, w, EPS, dy, delta), call=gradients_of("add_rms_norm", 4))
    for n, h in ((129, 1408), (33, 701)):
        x, narrow, dy = rng.standard_normal((n, 2 * h)), rng.standard_normal((n, h)), rng.standard_normal((n, h))
        yield "swiglu", Example(f"x [{n},{2 * h}]", (x,))
        yield "swiglu_backward", Example(f"x [{n},{2 * h}]", (dy, x))
        yield "gelu", Example(f"x [{n},{h}]", (narrow,))
        yield "gelu_backward", Example(f"x [{n},{h}]", (dy, narrow))
        yield "dropout", Example(f"x [{n},{h}]", (narrow, 0.3, Draw(int(rng.integers(2**40)), 7, 1, 5)))


def heads(rng: np.random.Generator) -> Iterator[tuple[str, Example]]:
    b, t, q, g, c = 2, 257, 6, 2, 64
    positions = np.arange(t, dtype=np.int32)[None]
    frequencies = Wide(10_000.0 ** (-np.arange(c // 2) / (c // 2)))
    x = rng.standard_normal((b, t, (q + 2 * g) * c))
    yield "split_heads", Example(f"qkv {list(x.shape)}", (x, positions, frequencies), {"heads": q, "groups": g})
    parts = tuple(rng.standard_normal((b, t, n, c)) for n in (q, g, g))
    yield "split_heads_backward", Example(f"dq {list(parts[0].shape)}", (*parts, positions, frequencies))
    yield "rope", Example(f"x {list(parts[0].shape)}", (parts[0], positions, frequencies))


def attention(rng: np.random.Generator) -> Iterator[tuple[str, Example]]:
    for b, t, q, g, c, window in ((1, 389, 4, 2, 64, 0), (2, 130, 2, 1, 128, 33), (1, 67, 3, 3, 40, 0)):
        arrays = tuple(rng.standard_normal((b, t, n, c)) for n in (q, g, g))
        positions = np.arange(t, dtype=np.int32)[None]
        options = {"scale": c**-0.5, "causal": True, "window": window, "q_pos": positions, "k_pos": positions}
        label = f"q {list(arrays[0].shape)}, k {list(arrays[1].shape)}, window {window}"
        yield "attention", Example(label, arrays, options)
        y, logsumexp = reference().attention(*arrays, **options)
        dy = rng.standard_normal(y.shape)
        yield "attention_backward", Example(label, (dy, *arrays, y, Wide(logsumexp)), options)


def gates(rng: np.random.Generator) -> Iterator[tuple[str, Example]]:
    for rule, n, e in (
        (Rule("softmax_topk", 8), 2049, 256), (Rule("softmax_topk", 1), 515, 64), (Rule("topk_softmax", 2), 1027, 8),
        (Rule("sigmoid_bias", 8, n_groups=8, top_groups=4, route_scale=2.5), 513, 256), (Rule("expert_choice", 2), 300, 33),
    ):  # fmt: skip
        order = np.argsort(rng.random((n, e)), axis=1)  # gaps that no rounding closes, along a row and down a column
        z = (order - e / 2) * (8.0 / e) + (4.0 / e) * rng.permutation(n)[:, None] / n * np.linspace(0.2, 1.0, e)
        bias = Wide(np.linspace(-0.01, 0.01, e) / e) if rule.router == "sigmoid_bias" else None
        label = f"{rule.router}, logits [{n},{e}], K {rule.top_k}"
        yield "gate", Example(label, (Wide(z), bias, None), {"rule": rule})
        found = reference().gate(z, None if bias is None else bias.array, None, rule=rule)
        wide = Gate(*(Wide(part) if part.dtype.kind == "f" else part for part in found))
        gradients = Wide(rng.standard_normal(found.weights.shape)), Wide(rng.standard_normal(e))
        yield "gate_backward", Example(label, (*gradients, wide, None), {"rule": rule})


def plans(rng: np.random.Generator) -> Iterator[tuple[str, Example]]:
    for n, e, k, d in ((1025, 64, 8, 257), (777, 256, 1, 1024), (640, 8, 2, 96)):
        skew = np.log1p(np.arange(e)) * rng.integers(0, 2)
        ids = np.argsort(skew - rng.gumbel(size=(n, e)), axis=1)[:, :k].astype(np.int32)
        weights, label = rng.random((n, k)), f"{n} tokens, {e} experts, K {k}"
        options = {"n_experts": e, "rows": n * k}
        yield "route", Example(label, (ids, Wide(weights), None), options, trim=trim_plan)
        plan = reference().route(ids, weights, None, **options)
        x, dy, many = rng.standard_normal((n, d)), rng.standard_normal((n, d)), rng.standard_normal((n * k, d))
        yield "dispatch", Example(f"x [{n},{d}], {label}", (x, plan))
        yield "dispatch_backward", Example(f"drows [{n * k},{d}], {label}", (many, plan))
        yield "combine", Example(f"rows [{n * k},{d}], {label}", (many, Wide(weights), plan))
        yield "combine_backward", Example(f"dy [{n},{d}], {label}", (dy, many, Wide(weights), plan))
    n, e, k = 65_537, 256, 8
    ids = np.resize(np.argsort(rng.random((4099, e)), axis=1)[:, :k].astype(np.int32), (n, k))
    weights = Wide(np.ones((n, k)))
    yield "route", Example(f"{n} tokens, {e} experts, K {k}", (ids, weights, None), {"n_experts": e, "rows": n * k}, trim=trim_plan)


def products(rng: np.random.Generator) -> Iterator[tuple[str, Example]]:
    for r, e, o, i in ((1500, 16, 384, 512), (801, 64, 130, 257), (600, 4, 256, 128)):
        shares = rng.dirichlet(np.full(e, 0.5))  # uneven, some experts empty
        offsets = np.concatenate([[0], np.cumsum(rng.multinomial(r, shares))]).astype(np.int32)
        x, dy, weight = rng.standard_normal((r, i)), rng.standard_normal((r, o)), rng.standard_normal((e, o, i)) * i**-0.5
        label = f"rows {r}, {e} experts, weight [{o},{i}]"
        yield "grouped_matmul", Example(label, (x, weight, offsets))
        yield "grouped_matmul", Example(f"{label}, transposed", (dy, weight, offsets, True))
        yield "grouped_matmul_dw", Example(label, (dy, x, offsets))


def layer(rng: np.random.Generator) -> Iterator[tuple[str, Example]]:
    n, d, h, e, k = 515, 128, 192, 16, 4
    ids = np.argsort(rng.random((n, e)), axis=1)[:, :k].astype(np.int32)
    gate_weights = rng.random((n, k))
    plan = reference().route(ids, gate_weights, None, n_experts=e, rows=n * k)
    weights = ExpertWeights(rng.standard_normal((e, 2 * h, d)) * d**-0.5, rng.standard_normal((e, d, h)) * h**-0.5)
    x, dy = rng.standard_normal((n, d)), rng.standard_normal((n, d))
    label = f"x [{n},{d}], H {h}, {e} experts, K {k}"
    yield "moe_ffn", Example(label, (x, Wide(gate_weights), plan, weights), call=outputs_of("moe_ffn", "swiglu", 0.0))
    both = gradients_of("moe_ffn", 4, "swiglu", 0.0)
    yield "moe_ffn_backward", Example(label, (x, Wide(gate_weights), plan, weights, dy), call=both)


def vocabulary(rng: np.random.Generator) -> Iterator[tuple[str, Example]]:
    for n, v in ((65, 50_257), (300, 256)):
        logits, targets = 3.0 * rng.standard_normal((n, v)), rng.integers(0, v, n).astype(np.int32)
        targets[::7] = -100
        _, _, logsumexp = reference().cross_entropy(logits, targets)
        yield "cross_entropy", Example(f"logits [{n},{v}]", (logits, targets))
        yield "cross_entropy_backward", Example(f"logits [{n},{v}]", (Wide(np.array(0.3)), logits, targets, Wide(logsumexp)))
    x, weight, targets = rng.standard_normal((257, 96)), rng.standard_normal((1001, 96)) * 0.1, rng.integers(0, 1001, 257).astype(np.int32)
    args = x, weight, targets, Wide(np.array(0.3))
    yield "linear_cross_entropy", Example("x [257,96], V 1001", args[:3], call=outputs_of("linear_cross_entropy"))
    yield "linear_cross_entropy_backward", Example("x [257,96], V 1001", args, call=gradients_of("linear_cross_entropy", 3))
    ids = rng.integers(0, 97, (5, 1003)).astype(np.int32)
    yield "embedding_backward", Example("ids [5,1003], weight [97,129]", (rng.standard_normal((5, 1003, 129)), ids, 97))


def buffers(rng: np.random.Generator) -> Iterator[tuple[str, Example]]:
    p = 100_003
    scalars = {"lr": 1e-3, "scale": 0.7}
    options = {name: Wide(np.array(value)) for name, value in scalars.items()}
    options |= {"step": np.array(5, np.int32), "ok": np.array(True), "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    param, m, grad = (rng.standard_normal(p) for _ in range(3))
    yield "adamw", Example(f"[{p}]", (param, m, rng.random(p), grad), options)
    yield "sum_of_squares", Example(f"[{p}]", (param,))
    yield "random_bits", Example(f"count {p}", (p, Draw(int(rng.integers(2**40)), 11, 2, 9)))


TOPICS: dict[str, Callable[[np.random.Generator], Iterator[tuple[str, Example]]]] = {
    "rows": rows, "heads": heads, "attention": attention, "gates": gates, "plans": plans, "products": products, "layer": layer,
    "vocabulary": vocabulary, "buffers": buffers,
}  # fmt: skip
"""Kernels with their examples, from a generator of random numbers."""


def check(backend: Backend, topic: str, dtype: str, seed: int) -> int:
    """Compare a topic's kernels with NumPy's float64.   -> the number of examples. Raises ConformanceError with the seed."""
    count = 0
    for kernel, example in TOPICS[topic](np.random.default_rng(seed)):
        run = Run(backend, kernel, dtype, replace(example, label=f"{example.label}, seed {seed}"))
        run.tolerance *= TERMS
        run.check()
        count += 1
    return count
