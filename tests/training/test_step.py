"""One step: its effect on the weights, the metrics in its array, and that no other file repeats it."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

import minimoe as mm
from benchmarks.models import Case
from benchmarks.peers import minimoe_step
from minimoe.backend import load
from minimoe.config import Config, ModelConfig, MoEConfig, TrainConfig
from minimoe.engine.recording import Recorded
from minimoe.model.transformer import Transformer
from minimoe.optim import make_optimizer
from minimoe.study.bench import TrainingStep
from minimoe.study.bench.step import random_tokens
from minimoe.training.metrics import FIGURES, LOSS, unpack
from minimoe.training.step import MAX_BAD_STEPS, Step

ROOT = Path(__file__).parents[2]
ROUTED = MoEConfig(n_experts=4, top_k=2, router="sigmoid_bias", jitter=0.1)
MODEL = ModelConfig(vocab_size=19, d_model=16, n_layers=3, n_heads=2, d_hidden=12, max_seq_len=8, dropout=0.1, moe=ROUTED)
CONFIG = Config(name="step", model=MODEL, train=TrainConfig(batch_size=3, seq_len=8, accumulate=2, lr=1e-2, warmup_steps=0))


def made(config: Config = CONFIG, backend: str = "numpy") -> Step:
    t, chosen = config.train, load(backend)
    model = Transformer(config.model, seed=0, dtype=t.dtype, backend=chosen)
    return Step(model, make_optimizer(model.parameters(), t), seed=t.seed, grad_clip=t.grad_clip, recompute=t.recompute)


def state(step: Step) -> dict[str, Any]:
    return {name: np.array(array) for name, array in {**step.model.state_dict(), **step.optimizer.state_dict()}.items()}


def test_the_figures_have_names_and_the_layers_follow() -> None:
    step = made()
    packed = step(*step.arrays(0, 1e-2, *random_tokens(CONFIG, 19)))
    assert packed.shape == (len(FIGURES) + 3 * (1 + 4),)
    found = unpack(packed.tolist(), n_layers=3, n_experts=4)
    assert found["loss"] == packed[LOSS] == pytest.approx(np.log(19), abs=0.1)
    assert (found["applied"], found["bad_steps"]) == (1.0, 0.0) and found["grad_norm"] > 0
    assert np.shape(found["expert_load"]) == (3, 4) and np.allclose(np.sum(found["expert_load"], axis=1), 1.0)
    assert len(found["aux_loss_layers"]) == 3


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_the_benchmarks_step_leaves_the_same_bytes_as_the_step_called_plainly(backend: str) -> None:
    timed, plain = TrainingStep(CONFIG, load(backend)), made(backend=backend)
    for number in range(4):
        figures = timed()
        expected = plain(*plain.arrays(number, mm.optim.learning_rate(number, CONFIG.train), *random_tokens(CONFIG, 19)))
        assert np.array_equal(figures, expected)
    one, other = state(timed.step), state(plain)
    assert all(np.array_equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_step_can_be_recorded(backend: str) -> None:
    reasons: list[str] = []
    step = made(backend=backend)
    recorded = Recorded(step, step.backend, reasons.append)
    for number in range(4):
        recorded(*step.arrays(number, 1e-2, *random_tokens(CONFIG, 19)))
    assert reasons == [] and (recorded.again is not None) == (backend == "numba")


def test_bad_steps_change_nothing_and_after_ten_of_them_good_ones_change_nothing_either() -> None:
    step = made()
    batch = random_tokens(CONFIG, 19)
    before, good = state(step), step.model.loss

    def poisoned(*args: Any, **options: Any) -> Any:
        parts = good(*args, **options)
        parts.cross_entropy.data = parts.cross_entropy.data * np.float32(np.nan)
        return parts

    step.model.loss = poisoned  # type: ignore[method-assign]
    with np.errstate(all="ignore"):
        verdicts = [unpack(step(*step.arrays(n, 1e-2, *batch)).tolist(), 3, 4)["bad_steps"] for n in range(MAX_BAD_STEPS)]
    assert verdicts == list(range(1, MAX_BAD_STEPS + 1))
    step.model.loss = good  # type: ignore[method-assign]
    assert unpack(step(*step.arrays(10, 1e-2, *batch)).tolist(), 3, 4)["applied"] == 0.0
    after = state(step)
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_the_cpu_benchmarks_step_gives_the_loss_of_its_model() -> None:
    tiny = Case("tiny", MODEL, seq_len=8, batch=2)
    parts = Transformer(MODEL, seed=0, backend=load("numpy")).loss(*tiny.random_batch(), rng=mm.Rng(0, 0))
    assert minimoe_step(tiny, "numpy", 1)() == pytest.approx(parts.cross_entropy.item(), rel=1e-6)


# ---- micro-batches with unequal numbers of targets -----------------------------------------------------------------------------

MASKED = ModelConfig(vocab_size=19, d_model=16, n_layers=2, n_heads=2, d_hidden=12, max_seq_len=16, causal=False, head="mlm")
COUNTS = (5, 0, 1, 3, 2, 9, 1, 16)  # targets of eight micro-batches of 1 x 16 tokens


def masked_config(model: ModelConfig, accumulate: int) -> Config:
    settings = TrainConfig(
        batch_size=8 // accumulate, seq_len=16, accumulate=accumulate, lr=1e-2, warmup_steps=0, dtype="float64", grad_clip=0.0
    )
    return Config(name="masked", model=model, train=settings)


def hidden_batch() -> tuple[Any, Any]:
    """Eight sequences, of which each has its own number of targets, the others being -100.   -> tokens, targets [8,16]"""
    rng = np.random.default_rng(3)
    tokens, targets = rng.integers(0, 19, (2, 8, 16)).astype(np.int32)
    for row, count in enumerate(COUNTS):
        targets[row, rng.permutation(16)[count:]] = -100
    return tokens, targets


def gradients(step: Step) -> dict[str, Any]:
    return {name: np.array(parameter.grad) for name, parameter in step.model.named_parameters()}


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("accumulate", [8, 4, 2])
def test_every_target_of_a_step_weighs_the_same_whatever_micro_batch_it_is_in(backend: str, accumulate: int) -> None:
    """A step of several micro-batches is the step of one batch of all their sequences."""
    whole, parted = (made(masked_config(MASKED, a), backend) for a in (1, accumulate))
    tokens, targets = hidden_batch()
    logits = np.array(whole.model(tokens).data)  # [8,16,V]
    figures = {}
    for step, a in ((whole, 1), (parted, accumulate)):
        shape = (a, 8 // a, 16)
        packed = step(*step.arrays(0, 1e-2, tokens.reshape(shape), targets.reshape(shape)))
        figures[a] = unpack(packed.tolist(), 0, 0)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = -np.take_along_axis(log_p, np.maximum(targets, 0)[..., None], axis=-1)[..., 0][targets >= 0].mean()
    assert figures[1]["loss"] == pytest.approx(expected, rel=1e-9)
    assert figures[accumulate]["loss"] == pytest.approx(expected, rel=1e-9)
    assert figures[accumulate]["grad_norm"] == pytest.approx(figures[1]["grad_norm"], rel=1e-9)
    one, other = gradients(whole), gradients(parted)
    assert all(np.allclose(other[name], one[name], rtol=1e-9, atol=1e-12) for name in one)


def test_the_routers_losses_weigh_the_same_in_every_micro_batch() -> None:
    moe = MoEConfig(n_experts=4, top_k=2, aux_loss_coef=0.5, z_loss_coef=0.1)
    config = masked_config(replace(MASKED, moe=moe), 4)
    step, other = made(config), made(config)
    tokens, targets = (side.reshape(4, 2, 16) for side in hidden_batch())
    found = unpack(step(*step.arrays(0, 1e-2, tokens, targets)).tolist(), 2, 4)
    router_losses = []
    other.optimizer.zero_grad()
    for micro in range(4):
        parts = other.model.loss(tokens[micro], targets[micro], rng=mm.Rng(0, 0, micro))
        assert parts.router_loss is not None
        share = float((targets[micro] >= 0).sum() / (targets >= 0).sum())
        (parts.cross_entropy * share + parts.router_loss * 0.25).backward()
        router_losses.append(parts.router_loss.item())
    assert found["router_loss"] == pytest.approx(np.mean(router_losses), rel=1e-9)
    one, by_hand = gradients(step), gradients(other)
    assert all(np.allclose(one[name], by_hand[name], rtol=1e-9, atol=1e-12) for name in one)


@pytest.mark.parametrize("accumulate", [2, 3, 5, 7])
def test_equal_numbers_of_targets_give_the_bytes_of_the_plain_mean(accumulate: int) -> None:
    """In float32: no rounding is added where every micro-batch has as many targets."""
    config = Config(name="step", model=MODEL, train=replace(CONFIG.train, accumulate=accumulate))
    step, other = made(config), made(config)
    tokens, targets = random_tokens(config, 19)
    packed = step(*step.arrays(0, 1e-2, tokens, targets))
    other.optimizer.zero_grad()
    total = np.float32(0)
    for micro in range(accumulate):
        parts = other.model.loss(tokens[micro], targets[micro], rng=mm.Rng(0, 0, micro))
        parts.total.backward(np.float32(1.0 / accumulate))
        total = parts.cross_entropy.data + total if micro else parts.cross_entropy.data
    assert packed[LOSS] == total * (1.0 / accumulate)
    one, by_hand = gradients(step), gradients(other)
    assert all(np.array_equal(one[name], by_hand[name]) for name in one)


PARTS_OF_A_STEP = re.compile(r"\.(clip_scale|update_balance)\(")  # what a copy of the step cannot do without


@pytest.mark.parametrize("folder", ["minimoe/training", "minimoe/study", "minimoe/cli", "benchmarks", "examples"])
def test_no_other_file_says_what_a_step_is(folder: str) -> None:
    files = [path for path in (ROOT / folder).rglob("*.py") if PARTS_OF_A_STEP.search(path.read_text(encoding="utf-8"))]
    assert files == ([ROOT / "minimoe/training/step.py"] if folder == "minimoe/training" else [])
