"""The sides of the CPU benchmark train the same model: equal losses and gradients, and as many FLOPs as minimoe counts."""

import io

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from parity import peers
from parity.peers import NUMPY, close, random_state
from rich.console import Console

import minimoe as mm
from benchmarks.cpu import with_ratios
from benchmarks.models import NAMES, case, products
from benchmarks.peers import Side, is_mixtral, minimoe_step, mixtral_losses, mixtral_model, sides, torch_model
from benchmarks.torch_models import load_arrays, stacked_name
from benchmarks.turns import measure
from minimoe.config.cost import attention_flops, cost

pytestmark = pytest.mark.parity
PRESETS = ("tiny-moe", "tiny-dense", "shakespeare-dense")
ROUTED = [name for name in NAMES if case(name).model.moe]


def shrunk(name):
    """A small version of the benchmark's model, with weights large enough for every gradient to count."""
    big = case(name)
    m = big.model
    moe = m.moe and replace(m.moe, n_experts=5, top_k=min(m.moe.k, 3), d_hidden=12)
    heads = 4 if m.n_heads != m.kv_heads else 2
    small = replace(
        m,
        d_model=16,
        n_layers=2,
        n_heads=heads,
        n_kv_heads=2,
        head_dim=None,
        d_hidden=20,
        max_seq_len=9,
        vocab_size=23,
        init_std=0.2,
        moe=moe,
    )
    return big._replace(model=small, seq_len=9, batch=3)


def torch_batch(small):
    return (torch.from_numpy(array).long() for array in small.random_batch())


def stacked_gradients(model):
    """Under minimoe's names: parameters of single experts are stacked."""
    found = {}
    for name, p in model.named_parameters():
        found.setdefault(stacked_name(name), []).append(p.grad)
    return {name: torch.stack(parts) if ".experts." in name and len(parts) > 1 else parts[0] for name, parts in found.items()}


CASES = [(name, style) for name in NAMES for style in (("loop", "sorted", "grouped") if name in ROUTED else ("",))]


@pytest.mark.parametrize(("name", "style"), CASES)
def test_pytorch_s_side_has_minimoe_s_loss_and_gradients(name, style):
    small = shrunk(name)
    ours = mm.Transformer(small.model, seed=1, backend=NUMPY)
    theirs = torch_model(small, style)
    load_arrays(theirs, ours.state_dict())
    parts = ours.loss(*small.random_batch(), rng=mm.Rng(0, 0))
    parts.total.backward()
    cross_entropy, router_loss = theirs(*torch_batch(small))
    (cross_entropy + router_loss).backward()
    close(parts.cross_entropy, cross_entropy, 1e-5, "cross-entropy")
    close(parts.total, cross_entropy + router_loss, 1e-5, "loss")
    expected = stacked_gradients(theirs)
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for key, p in ours.named_parameters():
        close(p.grad, expected[key], 1e-4, key)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ROUTED)
def test_mixtral_s_side_has_minimoe_s_loss_and_gradients(name, implementation):
    small = shrunk(name)
    theirs = mixtral_model(small, implementation)
    pooled = replace(small.model, moe=replace(small.model.moe, aux_convention="mixtral"))
    ours = mm.Transformer(pooled, backend=NUMPY)
    ours.load_state_dict(peers.mixtral(random_state(theirs), pooled.n_layers))
    parts = ours.loss(*small.random_batch(), rng=mm.Rng(0, 0))
    parts.total.backward()
    cross_entropy, total = mixtral_losses(theirs)(*torch_batch(small))
    total.backward()
    close(parts.cross_entropy, cross_entropy, 1e-4, "cross-entropy")
    close(parts.total, total, 1e-4, "loss")
    expected = peers.mixtral({key: p.grad.numpy() for key, p in theirs.named_parameters()}, pooled.n_layers)
    for key, p in ours.named_parameters():
        close(p.grad, expected[key], 1e-4, key)


@pytest.mark.parametrize("name", [*NAMES, *PRESETS])
def test_the_products_are_minimoe_s_flops_without_attention_s(name):
    whole = case(name)
    found = cost(whole.model, whole.seq_len)
    attention = 3 * attention_flops(whole.model, whole.seq_len) // whole.seq_len
    assert sum(p.training_flops for p in products(whole)) == whole.tokens * (found.training_flops_per_token - attention)


@pytest.mark.parametrize("name", ROUTED)
def test_every_routed_model_of_the_benchmark_has_mixtral_beside_it(name):
    assert is_mixtral(case(name)) and is_mixtral(shrunk(name))


@pytest.mark.parametrize("name", ["micro", "nano", "micro-moe"])
def test_every_eager_side_takes_steps_that_lower_the_loss(name):
    small = shrunk(name)
    for side, how in sides(small, ["numpy"], threads=1, compiled=False).items():
        step = how.make(small, *how.arguments)
        losses = [step() for _ in range(4)]
        assert how.kind == "products" or losses[-1] < losses[0], side


def test_a_side_that_fails_is_a_row_that_says_why():
    small = shrunk("micro")
    chosen = {
        "minimoe, numpy": Side("minimoe", ("minimoe.model.transformer",), minimoe_step, ("numpy", 1)),
        "minimoe, nowhere": Side("minimoe", (), minimoe_step, ("nowhere", 1)),
    }
    found = measure(small, chosen, rounds=2, threads=1, patience=60.0, console=Console(file=io.StringIO()))
    good, bad = (found[name] for name in chosen)
    assert "no backend 'nowhere'" in bad["failed"]
    assert good["steps"] >= 2 and good["median_ms"] > 0.0 and np.isfinite(good["loss"])
    assert 0.0 < good["peak_less_libraries_mb"] < good["peak_mb"]


def test_ratios_are_of_medians_and_leave_out_what_failed():
    rows = {
        "products": {"kind": "products", "median_ms": 5.0},
        "ours": {"kind": "minimoe", "median_ms": 10.0},
        "eager": {"kind": "eager", "median_ms": 30.0},
        "compiled": {"kind": "compiled", "median_ms": 20.0},
        "none": {"kind": "compiled", "failed": "no compiler"},
    }
    found = with_ratios(case("micro"), rows)["sides"]
    assert (found["ours"]["over_best_peer"], found["ours"]["over_best_eager"], found["ours"]["products_share"]) == (2.0, 3.0, 0.5)
    assert found["products"]["gflop_per_s"] == pytest.approx(sum(p.training_flops for p in products(case("micro"))) / 5e6)
    assert found["none"] == {"kind": "compiled", "failed": "no compiler"}
