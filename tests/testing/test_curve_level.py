"""The level "curve" finds faults that move the loss by little, and no choice of experts in it is nearly tied."""

import numpy as np
import pytest

from minimoe.reference import optimizers, routers
from minimoe.testing import ConformanceError, cases
from minimoe.testing.training import FEW, STEPS, curves, train
from minimoe.training.step import Step
from minimoe_numpy import NumpyBackend

MARGIN = 5e-5  # rounding in float32 moves logits of this size by about 1e-6


class Gaps(NumpyBackend):
    """Keeps the smallest gap between the last choice taken and the first that is not."""

    def __init__(self):
        super().__init__()
        self.gap = np.inf

    def gate(self, logits, bias, valid, *, rule):
        gate = super().gate(logits, bias, valid, rule=rule)
        choice = np.array(gate.scores) if bias is None else gate.scores + bias
        taken = np.zeros(choice.shape, dtype=bool)
        if routers.find(rule.router).by_expert:
            taken, choice = (gate.ids >= 0).T, choice.T
        else:
            np.put_along_axis(taken, gate.ids.astype(np.int64), True, axis=1)
        last, first = np.where(taken, choice, np.inf).min(1), np.where(taken, -np.inf, choice).max(1)
        self.gap = min(self.gap, float((last - first).min()))
        return gate


@pytest.mark.parametrize(
    "label", ["", *(label for label in curves() if label.partition(" ")[2] in ("gelu", *routers.ROUTERS, *optimizers.names()))]
)
def test_no_choice_of_experts_is_nearly_tied(label):
    backend = Gaps()
    train(backend, "float64", label, FEW if "router" in label or "optimizer" in label else STEPS)
    assert MARGIN < backend.gap < np.inf


def fails(backend, name):
    case = next(case for case in cases(backend, level="curve") if name in case.name)
    with pytest.raises(ConformanceError) as caught:
        case.run()
    return str(caught.value)


def test_tanh_in_place_of_erf():
    class Tanh(NumpyBackend):
        def gelu(self, x, tanh=False, out=None):
            return super().gelu(x, True, out)

    assert "activation gelu, step " in fails(Tanh(), "gelu")


def test_a_beta2_off_by_a_thousandth():
    class Off(NumpyBackend):
        def adamw(self, *args, beta2, **options):
            return super().adamw(*args, beta2=beta2 - 0.001, **options)

    assert "optimizer adamw, step " in fails(Off(), "optimizer adamw")


def test_a_router_that_does_not_normalise():
    class Raw(NumpyBackend):
        def gate(self, logits, bias, valid, *, rule):
            return super().gate(logits, bias, valid, rule=rule._replace(norm=False))

    assert "router sigmoid_bias, step 0 of" in fails(Raw(), "router sigmoid_bias")


def test_a_wrong_weight_of_one_micro_batch(monkeypatch):
    from minimoe.testing.training import expected_curve

    expected_curve("", STEPS)  # before the fault
    right = Step.weights
    monkeypatch.setattr(Step, "weights", lambda self, targets: right(self, targets) * np.array([1.001, 1.0], dtype=np.float32))
    assert "softmax_topk, optimizer adamw, step 0 of 20" in fails(NumpyBackend(), "20 training steps [float32]")
