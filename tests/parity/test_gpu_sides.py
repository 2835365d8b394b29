"""PyTorch's sides of the GPU benchmark work, on the processor at tiny sizes: kernels, layers and steps; those that need no card."""

import math

import pytest
import torch

from benchmarks.gpu import layer, step
from benchmarks.gpu.ceilings import ceiling_problems
from benchmarks.gpu.clocks import WallClock
from benchmarks.gpu.data import Data
from benchmarks.gpu.lab import Lab
from benchmarks.gpu.sides import Runner
from benchmarks.gpu.torch_kernels import ends_of
from benchmarks.gpu.torch_sides import Masters
from benchmarks.gpu.workers import kernel_problems
from minimoe.backend import load

pytestmark = pytest.mark.parity
SIDES = [*(side for case in layer.CASES["tiny"] for side in layer.layer_sides(case)), *step.step_sides(step.CASES["tiny"][0])]
HERE = [side for side in SIDES if side.kind == "eager" and "graph" not in side.name]
PROBLEMS = [problem for problem in (*ceiling_problems("tiny"), *kernel_problems("tiny")) if problem.peer is not None]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("problem", [pytest.param(p, id=f"{p.kernel}, {p.label}") for p in PROBLEMS])
def test_a_kernels_peer_works(problem):
    problem.peer.make("cpu")()


@pytest.mark.parametrize("side", [pytest.param(s, id=f"{s.name}, {s.dtype}, {i}") for i, s in enumerate(HERE)])
def test_a_side_works_and_a_step_learns(side):
    lab = Lab("tiny", {}, WallClock(lambda: None), 0, peers="cpu")
    runner = Runner(side, lab)
    first = runner.end()["loss"]
    runner.turn(8)
    last = runner.end()["loss"]
    assert first == last is None or (last < first - 0.02 and first < math.log(256) + 0.2)


def test_masters_are_rounded_before_a_pass_and_get_its_gradients_after():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
    module.add_module("router", torch.nn.Linear(3, 2))
    masters = Masters(module, "bfloat16")
    assert {p.dtype for p in masters.parameters} == {torch.float32} and module.router.weight in set(masters.own)
    with torch.no_grad():
        for parameter in masters.wide:
            parameter += 1.0
    masters.lower()
    assert torch.equal(module[0].weight, masters.wide[0].bfloat16()) and module[0].weight.dtype == torch.bfloat16
    module[1](module[0](torch.ones(2, 5, dtype=torch.bfloat16))).sum().backward()
    masters.widen()
    assert torch.equal(masters.wide[0].grad, module[0].weight.grad.float()) and bool(masters.wide[0].grad.any())


def test_in_float32_the_weights_are_their_own_masters():
    module = torch.nn.Linear(5, 4)
    masters = Masters(module, "float32")
    assert masters.parameters == [module.weight, module.bias]
    module(torch.ones(2, 5)).sum().backward()
    masters.widen()
    assert module.weight.grad is not None
    masters.lower()
    assert module.weight.grad is None


def test_peers_multiply_the_rows_that_minimoe_does():
    ends = Data(load("numpy")).offsets(1000, 16, "skewed")[1:]
    assert ends_of("cpu", 1000, 16, "skewed").tolist() == ends.tolist() and ends_of("cpu", 1000, 16, "balanced").tolist() != ends.tolist()
