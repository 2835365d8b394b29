"""The conformance suite: NumPy and a bare standard library pass it, a backend with a planted bug does not."""

import re

import numpy as np
import pytest
from strict_backend import StrictBackend

from minimoe.backend import Backend, check_overrides, kernel_names, load
from minimoe.errors import UserError
from minimoe.reference.routers import ROUTERS
from minimoe.reference.routing import Plan
from minimoe.testing import LEVELS, ConformanceError, cases
from minimoe.testing.kernels import EXAMPLES, advice
from minimoe.testing.quick import quick_examples
from minimoe_numpy import NumpyBackend

BACKENDS = {"numpy": load("numpy"), "numba": load("numba"), "strict": StrictBackend()}
ALL = [pytest.param(case, id=f"{name}: {case}") for name, backend in BACKENDS.items() for case in cases(backend)]


@pytest.mark.parametrize("case", ALL)
def test_the_backend_conforms(case):
    case.run()


class SinglePrecision(NumpyBackend):
    """A device without float64, as some are."""

    dtypes = ("float32",)

    def from_host(self, array):
        assert array.dtype != np.float64, "no float64 here"
        return super().from_host(array)


def test_a_backend_with_float32_alone_conforms():
    for case in cases(SinglePrecision()):
        if case.level != "repeatability":
            case.run()


@pytest.mark.parametrize("kernel", ["swiglu", "swiglu_backward", "gelu", "gelu_backward", "adamw", "sgd", "lion"])
def test_working_in_parts_of_a_cache_changes_nothing(kernel):
    class SmallCache(NumpyBackend):
        cache_elements = 40

    for case in cases(SmallCache(), level="kernels", kernel=kernel):
        if ", large" not in case.name:
            case.run()


def test_every_kernel_has_examples_and_a_case():
    assert set(EXAMPLES) == set(kernel_names())
    assert {case.kernel for case in cases(BACKENDS["numpy"], level="kernels")} == set(kernel_names())


def test_cases_are_chosen_by_level_and_kernel():
    numpy = BACKENDS["numpy"]
    assert {case.level for case in cases(BACKENDS["numba"])} == set(LEVELS)
    assert {case.level for case in cases(numpy)} == set(LEVELS) - {"recording"}  # it does not record
    assert {case.level for case in cases(numpy, level="curve")} == {"curve"}
    assert {case.kernel for case in cases(numpy, kernel="swiglu")} == {"swiglu"}
    with pytest.raises(UserError, match=r"no conformance level 'kernel' \(did you mean 'kernels'\?\)"):
        cases(numpy, level="kernel")
    with pytest.raises(UserError, match=r"no conformance case for 'swiglue' \(did you mean 'swiglu'\?\)"):
        cases(numpy, kernel="swiglue")


# ---- planted bugs -----------------------------------------------------------------------------------------------------------------------

KNOWN_ROUTERS = tuple(ROUTERS)


class WrongFactor(NumpyBackend):
    def gelu_backward(self, dy, x, tanh=False):
        return super().gelu_backward(dy, x, tanh) * 1.001


class ReadsUnusedRows(NumpyBackend):
    def grouped_matmul_dw(self, dy, x, offsets, out=None, accumulate=False):
        offsets = np.array(offsets)
        offsets[-1] = len(dy)
        return super().grouped_matmul_dw(dy, x, offsets, out, accumulate)


class TiesToTheHighest(NumpyBackend):
    def gate(self, logits, bias, valid, *, rule):
        flipped = super().gate(logits[:, ::-1], None if bias is None else bias[::-1], valid, rule=rule)
        if rule.router == "expert_choice":
            return super().gate(logits, bias, valid, rule=rule)
        ids = (logits.shape[1] - 1 - flipped.ids).astype(np.int32)
        return flipped._replace(ids=ids, scores=flipped.scores[:, ::-1], counts=flipped.counts[::-1], prob_sum=flipped.prob_sum[::-1])


class WritesItsInput(NumpyBackend):
    def rms_norm(self, x, weight, eps, out=None):
        result = super().rms_norm(x, weight, eps, out)
        x *= 2.0
        return result


class MissesEmptyExperts(NumpyBackend):
    def grouped_bias_backward(self, dy, offsets):
        full = super().grouped_bias_backward(dy, offsets)
        return full + np.where(np.diff(offsets)[:, None] > 0, 0, np.nan).astype(dy.dtype)


class AddsIntoOut(NumpyBackend):
    def linear_dw(self, dy, x, out=None, accumulate=False):
        return self.store(super().linear_dw(dy, x), out, accumulate=True)


class IgnoresAccumulate(NumpyBackend):
    def embedding_backward(self, dy, ids, vocab, padding=None, out=None, accumulate=False):
        return super().embedding_backward(dy, ids, vocab, padding, out)


class ForgetsItsReturn(NumpyBackend):
    def dispatch(self, x, plan, out=None):
        super().dispatch(x, plan, out)


class MaskedRowsAreNaN(NumpyBackend):
    def attention(self, q, k, v, *, scale, causal, window=0, q_pos, k_pos, k_valid=None, sinks=None, dropout=0.0, rng=None, out=None):
        masks = {"causal": causal, "window": window, "q_pos": q_pos, "k_pos": k_pos, "k_valid": k_valid}
        y, lse = super().attention(q, k, v, scale=scale, **masks, sinks=sinks, dropout=dropout, rng=rng, out=out)
        dead = np.isinf(np.transpose(lse, (0, 2, 1)))[..., None]
        y[...] = np.where(dead, np.nan, y)
        return y, lse


class IdsOutOfRange(NumpyBackend):
    def gate(self, logits, bias, valid, *, rule):
        result = super().gate(logits, bias, valid, rule=rule)
        bad = np.isnan(logits).any(axis=1, keepdims=True)
        return result._replace(ids=np.where(bad, logits.shape[1] + 9, result.ids).astype(np.int32))


class KnowsAllRouters(NumpyBackend):
    """It takes any router for the last one that it has a kernel for."""

    def gate(self, logits, bias, valid, *, rule):
        known = rule.router if rule.router in KNOWN_ROUTERS else "softmax_topk"
        return super().gate(logits, bias, valid, rule=rule._replace(router=known))


class SkippedStepMovesWeights(NumpyBackend):
    def sgd(self, inout_param, inout_m, grad, *, lr, scale, ok, momentum, weight_decay):
        super().sgd(inout_param, inout_m, grad, lr=lr, scale=scale, ok=ok, momentum=momentum, weight_decay=weight_decay)
        inout_param *= 1.0 - 0.1 * lr * ~ok


class WrongIndexType(NumpyBackend):
    def route(self, ids, weights, valid, *, n_experts, rows, capacity=None, priority="position"):
        plan = super().route(ids, weights, valid, n_experts=n_experts, rows=rows, capacity=capacity, priority=priority)
        return Plan(*(part.astype(np.int64) for part in plan))


class FusedHeadWrong(NumpyBackend):
    def linear_cross_entropy(self, x, weight, targets, ignore=-100):
        return super().linear_cross_entropy(x, weight, targets, ignore)

    def linear_cross_entropy_backward(self, dloss, saved, ignore=-100, out=None, accumulate=False):
        dx, dw = super().linear_cross_entropy_backward(dloss, saved, ignore, out, accumulate)
        dw /= max(1, len(saved.targets))
        return dx, dw


class DriftsBetweenCalls(NumpyBackend):
    calls = 0

    def softmax(self, x):
        type(self).calls += 1
        return super().softmax(x) * (1.0 + 1e-15 * (self.calls % 2) * 4)


BUGS = [
    (WrongFactor, "gelu_backward", "worst error"),
    (ReadsUnusedRows, "grouped_matmul_dw", "got nan"),
    (TiesToTheHighest, "gate", "equal logits.*ids"),
    (WritesItsInput, "rms_norm", "it wrote its input x"),
    (MissesEmptyExperts, "grouped_bias_backward", "offsets.*got nan"),
    (AddsIntoOut, "linear_dw", "out given.*got nan"),
    (IgnoresAccumulate, "embedding_backward", "out given, accumulate"),
    (ForgetsItsReturn, "dispatch", "returned None"),
    (MaskedRowsAreNaN, "attention", "got nan"),
    (IdsOutOfRange, "gate", "logits .* with nan"),
    (KnowsAllRouters, "gate", "a router of another package"),
    (SkippedStepMovesWeights, "sgd", "skipped"),
    (WrongIndexType, "route", "int64.*int32"),
    (FusedHeadWrong, "linear_cross_entropy_backward", "worst error"),
]


@pytest.mark.parametrize("planted, kernel, says", BUGS)
def test_a_planted_bug_fails_with_the_kernels_name(planted, kernel, says):
    backend: Backend = planted()
    check_overrides(backend)
    failures = []
    for case in cases(backend, level="kernels", kernel=kernel):
        if ", large" in case.name:
            continue
        with pytest.raises(ConformanceError) as caught:
            case.run()
        failures.append(str(caught.value))
    for text in failures:
        assert text.startswith(f"{kernel} at ")
        assert re.search(says, text), text
    for case in cases(backend, level="kernels"):
        if ", large" not in case.name and case.kernel in ("rope", "swiglu", "cross_entropy"):
            case.run()


def test_a_failure_says_shape_error_tolerance_and_what_to_do():
    says = r"gelu_backward at x \[1,1\], tanh False \[float32\], result: worst error .*, tolerance 1e-05"
    with pytest.raises(ConformanceError, match=says):
        cases(WrongFactor(), level="kernels", kernel="gelu_backward")[0].run()
    with pytest.raises(ConformanceError, match=r"The reference is in minimoe/reference/activation\.py"):
        cases(WrongFactor(), level="kernels", kernel="gelu_backward")[0].run()


def test_the_advice_knows_an_inherited_override_from_a_reference():
    inherited = type("Inherits", (WrongFactor,), {})
    assert "without the override" in advice(inherited(), "gelu_backward")
    assert "is the reference of minimoe/reference/expert.py" in advice(inherited(), "ffn_backward")


def test_a_wrong_gradient_fails_the_gradient_and_curve_levels_too():
    class WrongLinear(NumpyBackend):
        def linear_dw(self, dy, x, out=None, accumulate=False):
            return self.store(1.01 * super().linear_dw(dy, x), out, accumulate)

    for case in (*cases(WrongLinear(), level="gradients", kernel="linear"), cases(WrongLinear(), level="curve")[1]):
        with pytest.raises(ConformanceError):
            case.run()


def test_results_that_differ_between_calls_fail_repeatability():
    class Float64First(DriftsBetweenCalls):
        dtypes = ("float64", "float32")

    with pytest.raises(ConformanceError, match=r"gate at .*two calls with equal inputs differ"):
        cases(Float64First(), level="repeatability", kernel="gate")[0].run()


def test_quick_runs_an_example_of_odd_size_for_each_set_of_options():
    kernels = ("swiglu", "adamw", "random_bits", "gate")
    labels = {kernel: [example.label for example in quick_examples(EXAMPLES[kernel]())] for kernel in kernels}
    assert labels["swiglu"] == ["x [33,62], limit 0.0", "x [33,62], limit 2.0"]
    assert any("skipped" in label for label in labels["adamw"])
    assert any(int(label.split()[1].strip(",")) > 100 for label in labels["random_bits"])
    assert {label.split(",")[0] for label in labels["gate"]} >= {example.label.split(",")[0] for example in EXAMPLES["gate"]()}


def test_quick_leaves_out_most_calls_and_no_kernel():
    class Counting(NumpyBackend):
        dtypes = ("float32", "float64")
        calls = 0

        def gelu(self, x, tanh=False, out=None):
            Counting.calls += 1
            return super().gelu(x, tanh, out)

    counts = {}
    for quick in (False, True):
        Counting.calls, found = 0, cases(Counting(), kernel="gelu", quick=quick)
        for case in found:
            case.run()
        counts[quick] = Counting.calls
    assert 0 < counts[True] < counts[False] / 4
    named = {case.kernel for case in cases(Counting(), quick=True)}
    assert named == {case.kernel for case in cases(Counting())}


def test_quick_finds_a_wrong_branch_of_an_option():
    class WrongTanh(NumpyBackend):
        def gelu(self, x, tanh=False, out=None):
            return super().gelu(x * 1.01 if tanh else x, tanh, out)

    with pytest.raises(ConformanceError, match="tanh True"):
        for case in cases(WrongTanh(), level="kernels", kernel="gelu", quick=True):
            case.run()
