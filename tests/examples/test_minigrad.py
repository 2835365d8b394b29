"""examples/minigrad.py, the idea of the engine in 120 lines, computes the engine's gradients and learns."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import minimoe as mm

PATH = Path(__file__).parents[2] / "examples" / "minigrad.py"


@pytest.fixture(scope="module")
def minigrad():
    spec = importlib.util.spec_from_file_location("minigrad", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arrays():
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape) for shape in [(5, 2), (2, 3), (3,), (1, 3)]]


EXPRESSIONS = {
    "add, broadcast": lambda x, w, b, c: ((x @ w + b) * (c + b)).sum(),
    "subtract, broadcast": lambda x, w, b, c: ((b - x @ w) * (x @ w - c)).sum(),
    "multiply": lambda x, w, b, c: (x * x * x).sum() + (w * c * b).sum(),
    "a result that is used twice": lambda x, w, b, c: sum_twice(x @ w) + (b + c).sum() + (w * w).sum(),
    "exp": lambda x, w, b, c: ((x @ w).exp() * b * c).sum(),
    "log": lambda x, w, b, c: ((x @ w + b * c).exp() * (b * c + x @ w).exp()).sum().log(),
    "tanh": lambda x, w, b, c: ((x @ w + b).tanh() * c).sum(),
    "sum": lambda x, w, b, c: ((x.sum() * w).sum() * b * c).sum(),
}


def sum_twice(h):
    return (h + h).sum()


@pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_the_gradients_equal_the_engines(minigrad, expression):
    own = [minigrad.Tensor(array) for array in arrays()]
    leaves = [mm.tensor(array, requires_grad=True, backend=mm.backend.load("numpy")) for array in arrays()]
    losses = expression(*own), expression(*leaves)
    for loss in losses:
        loss.backward()
    np.testing.assert_allclose(losses[0].data, losses[1].data, rtol=1e-14)
    for tensor, leaf in zip(own, leaves, strict=True):
        np.testing.assert_allclose(tensor.grad, leaf.grad, rtol=1e-12)


def test_the_network_has_the_gradients_that_the_engine_gives_the_same_network(minigrad):
    rng = np.random.default_rng(1)
    (x, labels), model = minigrad.spiral(20, rng), minigrad.MLP(2, 6, 2, rng)
    loss = minigrad.cross_entropy(model(minigrad.Tensor(x)), labels)
    loss.backward()
    with mm.use_backend("numpy"):
        w1, b1, w2, b2 = leaves = [mm.tensor(p.data, requires_grad=True) for p in model.parameters]
        logits = (mm.tensor(x) @ w1 + b1).tanh() @ w2 + b2
        total = mm.ops.cross_entropy(logits, labels.astype(np.int32))[0] * (1 / 20)
        total.backward()
    assert loss.data == pytest.approx(total.item(), rel=1e-12)
    for parameter, leaf in zip(model.parameters, leaves, strict=True):
        np.testing.assert_allclose(parameter.grad, leaf.grad, rtol=1e-10)


def test_it_learns_the_spiral(minigrad):
    losses, right = minigrad.train()
    assert losses[-1] < 0.02 < 0.5 < losses[0] and right == 1.0


def test_it_has_at_most_120_lines_formatted_at_100_columns():
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "100", "--stdin-filename", "minigrad.py", "-"]
    formatted = subprocess.run(command, input=PATH.read_text(), capture_output=True, text=True, check=True).stdout
    assert formatted == PATH.read_text() and len(formatted.splitlines()) <= 120
