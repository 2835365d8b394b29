"""The exercises of docs/*.md: the answers of a reader, or the model answers below, judged against minimoe.

    MINIMOE_ANSWERS=exercises/answers.py python -m pytest tests/docs/test_exercises.py

takes the functions of that file. An exercise that it does not answer is skipped; without the variable the model answers are judged.
"""

import math
import os
from collections.abc import Sequence
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minimoe as mm
from minimoe.backend import load
from minimoe.config import LoraConfig
from minimoe.config.cost import cost
from minimoe.config.trained import adapter_shapes
from minimoe.generation import sampling
from minimoe.layers.cache import pieces
from minimoe.reference.gating import Rule

Array = Any  # NumPy's
ROOT = Path(__file__).resolve().parents[2]
PAGES = ("autograd", "attention", "gating", "routing-plan", "losses-and-collapse", "cost", "generation", "fine-tuning")

# ---- model answers --------------------------------------------------------------------------------------------------------------------


def silu_backward(dy: Array, x: Array) -> Array:
    s = 1.0 / (1.0 + np.exp(-x))
    return dy * (s + x * s * (1.0 - s))


def unbroadcast(gradient: Array, shape: tuple[int, ...]) -> Array:
    gradient = gradient.sum(axis=tuple(range(gradient.ndim - len(shape))))
    repeated = tuple(axis for axis, size in enumerate(shape) if size == 1)
    return gradient.sum(axis=repeated, keepdims=True)


def allowed(t: int, window: int) -> Array:
    distance = np.arange(t)[:, None] - np.arange(t)
    return (distance >= 0) & ((distance < window) if window else True)


def grouped_attention(q: Array, k: Array, v: Array) -> Array:
    (t, heads, c), groups = q.shape, k.shape[1]
    y = np.zeros((t, heads, v.shape[2]))
    for i in range(t):
        for h in range(heads):
            g = h // (heads // groups)
            score = k[: i + 1, g] @ q[i, h] / math.sqrt(c)
            p = np.exp(score - score.max())
            y[i, h] = p / p.sum() @ v[: i + 1, g]
    return y


def gate_sigmoid(logits: Array, bias: Array, k: int, route_scale: float) -> tuple[Array, Array]:
    s = 1.0 / (1.0 + np.exp(-logits))
    ids = np.argsort(-(s + bias), axis=1, kind="stable")[:, :k]
    chosen = np.take_along_axis(s, ids, axis=1)
    return route_scale * chosen / chosen.sum(axis=1, keepdims=True), ids


def topk_softmax_backward(dweights: Array, logits: Array, k: int) -> Array:
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    chosen = np.exp(np.take_along_axis(logits, ids, axis=1))
    w = chosen / chosen.sum(axis=1, keepdims=True)
    dlogits = np.zeros_like(logits)
    np.put_along_axis(dlogits, ids, w * (dweights - (dweights * w).sum(axis=1, keepdims=True)), axis=1)
    return dlogits


def plan(ids: Sequence[Sequence[int]], n_experts: int) -> tuple[list[int], list[list[int]], list[int]]:
    k = len(ids[0])
    order, offsets = [], [0]
    for expert in range(n_experts):
        order += [n * k + j for n, row in enumerate(ids) for j, chosen in enumerate(row) if chosen == expert]
        offsets.append(len(order))
    return order, [[order.index(n * k + j) for j in range(k)] for n in range(len(ids))], offsets


def kept(ids: Array, weights: Array, n_experts: int, capacity: int, priority: str) -> Array:
    flat, weight, keep = ids.ravel(), weights.ravel(), np.zeros(ids.size, dtype=bool)
    for expert in range(n_experts):
        slots = [slot for slot in range(flat.size) if flat[slot] == expert]
        if priority == "probability":
            slots.sort(key=lambda slot: -weight[slot])  # stable: ties stay in order
        keep[slots[:capacity]] = True
    return keep.reshape(ids.shape)


def balance_loss(probs: Array, ids: Array) -> float:
    e = probs.shape[1]
    f = np.bincount(ids.ravel(), minlength=e) / ids.size
    return float(e * (f * probs.mean(axis=0)).sum())


def z_loss_backward(logits: Array) -> Array:
    e = np.exp(logits)
    total = e.sum(axis=1, keepdims=True)
    return 2.0 * np.log(total) * e / total / len(logits)


def parameters(d: int, layers: int, q: int, g: int, c: int, h: int, e: int, k: int, v: int) -> tuple[int, int]:
    shared = d * c * (q + 2 * g) + q * c * d + e * d + 2 * d
    outside = 2 * v * d + d
    return layers * (shared + 3 * e * d * h) + outside, layers * (shared + 3 * k * d * h) + outside


def flops_per_token(d: int, layers: int, q: int, g: int, c: int, h: int, e: int, k: int, v: int, t: int) -> int:
    weights = d * c * (q + 2 * g) + q * c * d + e * d + 3 * k * d * h
    return layers * (2 * weights + 4 * t * q * c) + 2 * v * d


def ring_slots(first: int, columns: int, slots: int) -> Array:
    last = first + columns
    return np.asarray([max((c for c in range(max(0, last - slots), last) if c % slots == slot), default=-1) for slot in range(slots)])


def nucleus(z: Array, p: float) -> Array:
    order = np.argsort(-z, kind="stable")
    probabilities = np.exp(z[order] - z.max())
    held = np.cumsum(probabilities / probabilities.sum())
    return order[: int(np.searchsorted(held, p)) + 1]


def adapter_gradients(dw: Array, a: Array, b: Array, scale: float) -> tuple[Array, Array]:
    return scale * b.T @ dw, scale * dw @ a.T


def adapter_numbers(d: int, h: int, experts: int, layers: int, rank: int) -> int:
    return layers * experts * rank * ((2 * h + d) + (d + h))


# ---- whose answer is judged -----------------------------------------------------------------------------------------------------------


@cache
def readers_answers(path: str) -> Any:
    spec = spec_from_file_location("minimoe_answers", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise FileNotFoundError(f"MINIMOE_ANSWERS = {path}: give the path of a Python file with your answers")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(name: str) -> Any:
    """The reader's function of that name, else the model's."""
    path = os.environ.get("MINIMOE_ANSWERS")
    if not path:
        return globals()[name]
    if not hasattr(readers_answers(path), name):
        pytest.skip(f"{path} does not answer {name}")
    return getattr(readers_answers(path), name)


@pytest.fixture(autouse=True)
def numpy_backend() -> Any:
    with mm.use_backend("numpy"):
        yield


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def distinct_logits(n: int, e: int) -> Array:
    """Logits [N,E] without ties, in steps of 0.4."""
    return np.random.default_rng(1).permuted(np.tile(np.arange(e) * 0.4 - 1.0, (n, 1)), axis=1)


# ---- the exercises --------------------------------------------------------------------------------------------------------------------


def test_autograd_1_the_gradient_of_silu_has_two_terms() -> None:
    x, dy = draw(7, 3), draw(7, 3, seed=1)
    leaf = mm.tensor(x, requires_grad=True)
    (leaf * mm.ops.sigmoid(leaf)).backward(dy)
    np.testing.assert_allclose(answer("silu_backward")(dy, x), np.asarray(leaf.grad), rtol=1e-10)


@pytest.mark.parametrize("shape", [(4, 3), (3,), (4, 1), (1, 3), (1, 1), (1,), ()])
def test_autograd_2_a_broadcast_operand_gets_the_sum_of_its_copies_gradients(shape: tuple[int, ...]) -> None:
    dy = draw(4, 3)
    leaf = mm.tensor(np.asarray(draw(*shape)), requires_grad=True)
    (leaf + mm.tensor(draw(4, 3))).backward(dy)
    got = np.asarray(answer("unbroadcast")(dy, shape))
    assert got.shape == shape
    np.testing.assert_allclose(got, np.asarray(leaf.grad), rtol=1e-10)


@pytest.mark.parametrize("window", [0, 1, 3, 9])
def test_attention_1_a_causal_layer_sees_the_window_before_it(window: int) -> None:
    t = 6
    positions = np.arange(t, dtype=np.int32)[None]
    zeros, eye = np.zeros((1, t, 1, 2)), np.eye(t)[None, :, None, :]
    p, _ = load("numpy").attention(zeros, zeros, eye, scale=1.0, causal=True, window=window, q_pos=positions, k_pos=positions)
    np.testing.assert_array_equal(np.asarray(answer("allowed")(t, window), dtype=bool), p[0, :, 0, :] > 0)


@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (3, 1)])
def test_attention_2_query_heads_share_the_keys_of_their_group(heads: int, groups: int) -> None:
    q, k, v = draw(5, heads, 8), draw(5, groups, 8, seed=1), draw(5, groups, 8, seed=2)
    positions = np.arange(5, dtype=np.int32)[None]
    y, _ = load("numpy").attention(q[None], k[None], v[None], scale=8**-0.5, causal=True, q_pos=positions, k_pos=positions)
    np.testing.assert_allclose(answer("grouped_attention")(q, k, v), y[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k, route_scale", [(1, 1.0), (2, 2.5), (6, 1.0)])
def test_gating_1_the_sigmoid_router_chooses_with_the_bias_and_weighs_without(k: int, route_scale: float) -> None:
    z, bias = distinct_logits(9, 6), draw(6)
    expected = load("numpy").gate(z, bias, None, rule=Rule("sigmoid_bias", k, True, route_scale=route_scale))
    weights, ids = answer("gate_sigmoid")(z, bias, k, route_scale)
    np.testing.assert_array_equal(ids, expected.ids)
    np.testing.assert_allclose(weights, expected.weights, rtol=1e-10)


@pytest.mark.parametrize("k", [1, 2, 6])
def test_gating_2_only_the_chosen_logits_get_a_gradient_from_topk_softmax(k: int) -> None:
    z, dweights = distinct_logits(9, 6), draw(9, k)
    leaf = mm.tensor(z, requires_grad=True)
    mm.ops.gate(leaf, None, None, Rule("topk_softmax", k))[0].backward(dweights)
    np.testing.assert_allclose(answer("topk_softmax_backward")(dweights, z, k), np.asarray(leaf.grad), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n, k", [(1, 1), (5, 2), (31, 3)])
def test_routing_1_the_plan_sorts_slots_by_expert_and_keeps_their_order(n: int, k: int) -> None:
    gate = load("numpy").gate(draw(n, 7), None, None, rule=Rule("softmax_topk", k))
    expected = load("numpy").route(gate.ids, gate.weights, None, n_experts=7, rows=n * k)
    for got, right in zip(answer("plan")(gate.ids.tolist(), 7), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(got), right)


@pytest.mark.parametrize("priority", ["position", "probability"])
@pytest.mark.parametrize("capacity", [1, 3, 40])
def test_routing_2_an_expert_keeps_its_first_or_its_heaviest_slots(capacity: int, priority: str) -> None:
    logits = distinct_logits(20, 4) + np.array([1.0, 0.0, 0.0, 0.0])
    gate = load("numpy").gate(logits, None, None, rule=Rule("softmax_topk", 2))
    expected = load("numpy").route(gate.ids, gate.weights, None, n_experts=4, rows=40, capacity=capacity, priority=priority)
    got = answer("kept")(gate.ids, gate.weights, 4, capacity, priority)
    np.testing.assert_array_equal(np.asarray(got, dtype=bool), expected.inverse >= 0)


@pytest.mark.parametrize("e, k", [(4, 1), (5, 2), (3, 3)])
def test_losses_1_the_balance_loss_is_that_of_the_layer(e: int, k: int) -> None:
    moe = mm.MoEConfig(n_experts=e, top_k=k, norm_topk_prob=False)
    layer, x = mm.MoE(d_model=6, d_hidden=4, moe=moe, dtype="float64", std=0.5), draw(17, 6)
    _, stats = layer(mm.tensor(x))
    gate = load("numpy").gate(x @ layer.state_dict()["router.weight"].T, None, None, rule=Rule("softmax_topk", k))
    assert answer("balance_loss")(gate.scores, gate.ids) == pytest.approx(stats.aux_loss.item(), rel=1e-10)


def test_losses_2_the_z_loss_pulls_each_logit_by_its_probability() -> None:
    leaf = mm.tensor(draw(9, 5), requires_grad=True)
    mm.ops.power(mm.ops.logsumexp(leaf), 2.0).mean().backward()
    np.testing.assert_allclose(answer("z_loss_backward")(leaf.numpy()), np.asarray(leaf.grad), rtol=1e-9)


SHAPES = [(8, 2, 4, 2, 6, 12, 4, 2, 11), (16, 3, 2, 1, 8, 5, 8, 1, 100), (4096, 32, 32, 8, 128, 14336, 8, 2, 32000)]


def config(d: int, layers: int, q: int, g: int, c: int, h: int, e: int, k: int, v: int) -> mm.ModelConfig:
    moe = mm.MoEConfig(n_experts=e, top_k=k, norm_topk_prob=False)
    return mm.ModelConfig(
        d_model=d, n_layers=layers, n_heads=q, n_kv_heads=g, head_dim=c, d_hidden=h, vocab_size=v, max_seq_len=4096, moe=moe
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_cost_1_parameters_are_counted_in_all_and_for_one_token(shape: tuple[int, ...]) -> None:
    found = cost(config(*shape))
    assert tuple(answer("parameters")(*shape)) == (found.total, found.active)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [1, 77])
def test_cost_2_flops_are_two_a_weight_and_grow_with_the_keys(shape: tuple[int, ...], t: int) -> None:
    assert answer("flops_per_token")(*shape, t) == cost(config(*shape), seq_len=t).flops_per_token


def test_fine_tuning_1_the_gradients_of_an_adapter() -> None:
    w, a, b, dw = draw(5, 4), draw(2, 4, seed=1), draw(5, 2, seed=2), draw(5, 4, seed=3)
    leaves = [mm.tensor(array, requires_grad=True) for array in (w, a, b)]
    mm.ops.low_rank(*leaves, 0.5).backward(dw)
    for found, leaf in zip(answer("adapter_gradients")(dw, a, b, 0.5), leaves[1:], strict=True):
        np.testing.assert_allclose(found, leaf.grad)


@pytest.mark.parametrize("d, h, experts, layers, rank", [(16, 24, 4, 2, 3), (8, 8, 1, 1, 1)])
def test_fine_tuning_2_the_numbers_of_the_experts_adapters(d: int, h: int, experts: int, layers: int, rank: int) -> None:
    moe = mm.MoEConfig(n_experts=experts, top_k=1, router="switch", d_hidden=h)
    model = mm.ModelConfig(d_model=d, n_layers=layers, n_heads=2, d_hidden=h, vocab_size=9, moe=moe)
    shapes = adapter_shapes(model, LoraConfig(rank=rank, targets=("experts",)))
    assert answer("adapter_numbers")(d, h, experts, layers, rank) == sum(int(np.prod(shape)) for _, shape in shapes)


# ---- the plug ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first, columns, slots", [(0, 3, 5), (0, 5, 5), (3, 4, 5), (4, 1, 4), (7, 9, 4), (0, 1, 1)])
def test_generation_1_a_ring_holds_the_last_columns(first: int, columns: int, slots: int) -> None:
    ring = np.full(slots, -1)
    for start, count in ((0, first), (first, columns)):
        for into, of in pieces(start, count, slots):
            ring[into] = np.arange(start, start + count)[of]
    np.testing.assert_array_equal(answer("ring_slots")(first, columns, slots), ring)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0])
def test_generation_2_the_nucleus_is_what_is_drawn(p: float) -> None:
    z = np.random.default_rng(5).permutation(np.linspace(-2.0, 2.0, 9))
    drawn = {sampling.draw(z, sampling.Sampling(temperature=1.0, top_p=p), position) for position in range(600)}
    kept_ids = answer("nucleus")(z, p)
    assert drawn == {int(i) for i in kept_ids}
    assert (np.diff(z[kept_ids]) < 0).all()


@pytest.mark.parametrize("page", PAGES)
def test_each_page_has_two_exercises_that_name_a_judged_function(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    for number in (1, 2):
        name = text.split(f"**Exercise {number}.** `")[1].split("(")[0]
        assert callable(globals()[name])


def test_a_readers_file_takes_the_place_of_the_model_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "answers.py"
    file.write_text("def allowed(t, window):\n    return 'mine'\n")
    monkeypatch.setenv("MINIMOE_ANSWERS", str(file))
    assert answer("allowed")(3, 0) == "mine"
    with pytest.raises(pytest.skip.Exception, match="does not answer kept"):
        answer("kept")
    monkeypatch.setenv("MINIMOE_ANSWERS", str(tmp_path / "none.py"))
    with pytest.raises(FileNotFoundError, match="give the path"):
        answer("kept")
