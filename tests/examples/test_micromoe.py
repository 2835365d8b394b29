"""examples/micromoe.py, which differentiates by hand in one file, trains exactly as minimoe does."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

import minimoe as mm
from minimoe.backend import load
from minimoe.optim import learning_rate, make_optimizer

PATH = Path(__file__).parents[2] / "examples" / "micromoe.py"
SIZES = {"d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_hidden": 12}
STEPS = 20


@pytest.fixture(scope="module")
def micromoe():
    spec = importlib.util.spec_from_file_location("micromoe", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["micromoe"] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model():
    moe = mm.MoEConfig(n_experts=5, top_k=2, aux_loss_coef=0.02, z_loss_coef=0.003)
    return mm.Transformer(mm.ModelConfig(**SIZES, max_seq_len=12, vocab_size=23, moe=moe), seed=0, dtype="float64", backend=load("numpy"))


@pytest.fixture
def config(micromoe):
    return micromoe.Config(
        **SIZES, vocab_size=23, n_experts=5, top_k=2, aux_coef=0.02, z_coef=0.003, steps=STEPS, warmup=5, lr=1e-2, min_lr=1e-3
    )


def batches():
    """Tokens that count up by one or two.   -> tokens, targets [3,12] each"""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        windows = (rng.integers(0, 23, (3, 1)) + rng.integers(1, 3, (3, 1)) * np.arange(13)) % 23
        yield windows[:, :-1], windows[:, 1:]


def weights_of(model):
    return {name: np.array(array) for name, array in model.state_dict().items()}


def test_one_batch_has_the_same_loss_and_gradients(micromoe, model, config):
    tokens, targets = next(batches())
    parts = model.loss(tokens, targets)
    parts.total.backward()
    total, cross_entropy, gradients = micromoe.loss_and_gradients(weights_of(model), tokens, targets, config)
    assert parts.total.item() == pytest.approx(total, rel=1e-12) and parts.cross_entropy.item() == pytest.approx(cross_entropy, rel=1e-12)
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(ours[name], gradient, rtol=1e-8, atol=1e-12, err_msg=name)


def test_twenty_steps_have_the_same_losses(micromoe, model, config):
    theirs = list(micromoe.train(weights_of(model), batches(), config))
    train = mm.TrainConfig(steps=STEPS, warmup_steps=5, lr=1e-2, min_lr=1e-3, weight_decay=micromoe.WEIGHT_DECAY, eps=micromoe.ADAM_EPS)
    train = replace(train, beta1=micromoe.BETA1, beta2=micromoe.BETA2, grad_clip=micromoe.CLIP)
    optimizer, ours = make_optimizer(model.parameters(), train), []
    for step, (tokens, targets) in enumerate(batches()):
        parts = model.loss(tokens, targets)
        parts.total.backward()
        optimizer.step(lr=learning_rate(step, train), scale=optimizer.clip_scale(optimizer.grad_norm(), train.grad_clip))
        optimizer.zero_grad()
        ours.append(parts.cross_entropy.item())
    assert theirs[-1] < theirs[0] - 0.3
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)
