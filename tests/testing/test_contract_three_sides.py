"""The kernel contract from three sides: NumPy's references, a fused expert_ffn in Numba, a CUDA gate that runs on the processor."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
import pytest
from cuda_on_cpu.cpu_cuda import ORDERS, CudaOnCpu

from minimoe.backend import Array, Backend, check_overrides, kernel_kinds
from minimoe.config import MoEConfig
from minimoe.engine.creation import tensor
from minimoe.errors import UserError
from minimoe.layers.moe import MoE
from minimoe.reference.expert import ExpertWeights
from minimoe.reference.gating import Gate, Rule
from minimoe_numpy import NumpyBackend

GATE_CU = Path(__file__).parents[1] / "cuda_on_cpu" / "gate.cu"
WARPS, MAX_EXPERTS = 4, 256  # as in gate.cu
SWIGLU, RELU, GELU, GELU_TANH = range(4)
ACTIVATIONS = {"swiglu": SWIGLU, "relu": RELU, "gelu": GELU, "gelu_tanh": GELU_TANH}
D, H = 5, 7
Function = TypeVar("Function", bound=Callable[..., Any])


# ---- a fused expert_ffn in Numba ------------------------------------------------------------------------------------------------------


def compiled(function: Function) -> Function:
    """numba.njit, typed as the plain function that it stands for."""
    return cast(Function, numba.njit(function))


@compiled
def activation(g: float, u: float, kind: int, limit: float) -> tuple[float, float, float]:
    """act(g), for swiglu act(g, u), and its slopes by g and u; formulas: reference/activation.py"""
    if kind == SWIGLU:
        alpha, shift, open_g, open_u = 1.0, 0.0, 1.0, 1.0
        if limit > 0.0:
            alpha, shift, open_g, open_u = 1.702, 1.0, 1.0 if g <= limit else 0.0, 1.0 if abs(u) <= limit else 0.0
            g, u = min(g, limit), max(-limit, min(u, limit))
        s = 1.0 / (1.0 + math.exp(-max(alpha * g, -80.0)))
        return g * s * (u + shift), open_g * (s + alpha * g * s * (1.0 - s)) * (u + shift), open_u * g * s
    if kind == RELU:
        return max(g, 0.0), 1.0 if g > 0.0 else 0.0, 0.0
    if kind == GELU:
        phi = 0.5 * (1.0 + math.erf(g * math.sqrt(0.5)))
        return g * phi, phi + g * math.exp(-0.5 * g * g) / math.sqrt(2.0 * math.pi), 0.0
    scale, cube = math.sqrt(2.0 / math.pi), 0.044715
    t = math.tanh(scale * (g + cube * g * g * g))
    return 0.5 * g * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * scale * (1.0 + 3.0 * cube * g * g), 0.0


@compiled
def forward(
    rows: Array, up: Array, down: Array, up_bias: Array, down_bias: Array, offsets: Array, kind: int, limit: float, before: Array, y: Array
) -> None:
    """Row by row; sums in float64. A bias of width 0 is none. `before` [R,O] is kept for backward, y [R,D]; unused rows of y become 0."""
    hidden = np.empty(down.shape[2])
    for e in range(up.shape[0]):
        for r in range(offsets[e], offsets[e + 1]):
            for o in range(up.shape[1]):
                total = up_bias[e, o] if up_bias.shape[1] else 0.0
                for d in range(rows.shape[1]):
                    total += float(up[e, o, d]) * rows[r, d]
                before[r, o] = total
            for h in range(len(hidden)):
                hidden[h] = activation(float(before[r, h]), float(before[r, up.shape[1] - len(hidden) + h]), kind, limit)[0]
            for d in range(y.shape[1]):
                total = down_bias[e, d] if down_bias.shape[1] else 0.0
                for h in range(len(hidden)):
                    total += down[e, d, h] * hidden[h]
                y[r, d] = total
    y[offsets[-1] :] = 0.0


@compiled
def backward(
    dy: Array, rows: Array, up: Array, down: Array, before: Array, offsets: Array, kind: int, limit: float,
    drows: Array, dup: Array, ddown: Array, dup_bias: Array, ddown_bias: Array,
) -> None:  # fmt: skip
    """Row by row, the hidden activations computed again; adds into dup, ddown and the bias gradients, which start at zero."""
    h_width = down.shape[2]
    second = up.shape[1] - h_width  # where swiglu's up half starts
    dbefore = np.empty(up.shape[1])
    for e in range(up.shape[0]):
        for r in range(offsets[e], offsets[e + 1]):
            for h in range(h_width):
                value, by_g, by_u = activation(float(before[r, h]), float(before[r, second + h]), kind, limit)
                dhidden = 0.0
                for d in range(dy.shape[1]):
                    dhidden += float(dy[r, d]) * down[e, d, h]
                    ddown[e, d, h] += dy[r, d] * value
                dbefore[second + h] = dhidden * by_u
                dbefore[h] = dhidden * by_g
            for d in range(rows.shape[1]):
                total = 0.0
                for o in range(len(dbefore)):
                    total += dbefore[o] * up[e, o, d]
                    dup[e, o, d] += dbefore[o] * rows[r, d]
                drows[r, d] = total
            dup_bias[e] += dbefore
            ddown_bias[e] += dy[r]
    drows[offsets[-1] :] = 0.0


class NumbaExperts(NumpyBackend):
    """NumPy with a fused expert_ffn; what it saves is (rows, weights, offsets, before)."""

    name = "numba-experts"

    def expert_ffn(self, rows: Array, weights: ExpertWeights, offsets: Array, activation: str, limit: float = 0.0) -> tuple[Array, Any]:
        up, down = self.contiguous(weights.up), self.contiguous(weights.down)
        none = np.empty((len(up), 0), dtype=rows.dtype)
        up_bias, down_bias = (none if bias is None else self.contiguous(bias) for bias in (weights.up_bias, weights.down_bias))
        rows = self.contiguous(rows)
        before = np.empty((len(rows), up.shape[1]), dtype=rows.dtype)
        y = np.empty_like(rows)
        forward(rows, up, down, up_bias, down_bias, offsets, ACTIVATIONS[activation], float(limit), before, y)
        return y, (rows, weights, offsets, before)

    def expert_ffn_backward(
        self, dy: Array, saved: Any, activation: str, limit: float = 0.0, out: ExpertWeights | None = None, accumulate: bool = False
    ) -> tuple[Array, ExpertWeights]:
        rows, weights, offsets, before = saved
        up, down = self.contiguous(weights.up), self.contiguous(weights.down)
        drows, dup, ddown = np.empty_like(rows), np.zeros_like(up), np.zeros_like(down)
        dup_bias, ddown_bias = np.zeros(up.shape[:2], dtype=up.dtype), np.zeros(down.shape[:2], dtype=down.dtype)
        gradients = (drows, dup, ddown, dup_bias, ddown_bias)
        backward(self.contiguous(dy), rows, up, down, before, offsets, ACTIVATIONS[activation], float(limit), *gradients)
        fresh = (dup, ddown, None if weights.up_bias is None else dup_bias, None if weights.down_bias is None else ddown_bias)
        stored = (None if d is None else self.store(d, to, accumulate) for d, to in zip(fresh, out or (None,) * 4, strict=True))
        return drows, ExpertWeights(*stored)


# ---- a CUDA gate ----------------------------------------------------------------------------------------------------------------------


class CudaGate(NumpyBackend):
    """NumPy with the gate of gate.cu for softmax_topk in float32 without padding; any other case is the reference's."""

    name = "cuda-gate"

    def __init__(self, order: str = "forward") -> None:
        self._launch = CudaOnCpu(GATE_CU, ["gate_softmax_topk"], order).kernel("gate_softmax_topk")
        self._ticket = np.zeros(1, dtype=np.int32)

    def gate(self, logits: Array, bias: Array | None, valid: Array | None, *, rule: Rule) -> Gate:
        n, e = logits.shape
        covered = rule.router == "softmax_topk" and logits.dtype == np.float32 and valid is None and n > 0 and e <= MAX_EXPERTS
        if not covered:
            return super().gate(logits, bias, valid, rule=rule)
        if not 1 <= rule.top_k <= e:
            raise ValueError(f"gate: top_k = {rule.top_k} must be 1 to {e}, the number of experts")
        blocks = -(-n // WARPS)
        result = Gate(
            np.full((n, rule.top_k), np.nan, np.float32), np.full((n, rule.top_k), -7, np.int32), np.full((n, e), np.nan, np.float32),
            np.full(e, -7, np.int32), np.full(e, np.nan, np.float32),
        )  # fmt: skip
        scratch = (np.full((blocks, e), -7, np.int32), np.full((blocks, e), np.nan, np.float32), self._ticket)
        sizes = (np.int32(n), np.int32(e), np.int32(rule.top_k), np.int32(rule.norm))
        self._launch((blocks,), (32 * WARPS,), (self.contiguous(logits), *result, *scratch, *sizes))
        return result


class FarArray(np.ndarray):
    """An array that behaves as if it lay on a device: Python may not look at its numbers."""

    def _refuse(self, *_: Any) -> Any:
        raise AssertionError("a host read inside the step")

    __bool__ = __int__ = __float__ = __index__ = __iter__ = item = tolist = _refuse

    def __getitem__(self, index: Any) -> Any:
        return far(super().__getitem__(index))


def far(value: Any) -> Any:
    """NumPy's results, arrays and scalars, as far arrays; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(far(part) for part in value)
    return np.asarray(value).view(FarArray) if isinstance(value, np.ndarray | np.generic) else value


class FarNamespace:
    """NumPy, whose functions here give far arrays."""

    def __getattr__(self, name: str) -> Any:
        member = getattr(np, name)
        if isinstance(member, type) or not callable(member):
            return member
        return lambda *args, **options: far(member(*args, **options))


class AllThree(NumbaExperts, CudaGate):
    """Both overrides, on arrays that refuse to be read on the host."""

    name = "all-three"
    xp: Any = FarNamespace()

    def from_host(self, array: np.ndarray[Any, Any]) -> Array:
        return far(super().from_host(array))

    def to_host(self, array: Array) -> np.ndarray[Any, Any]:
        raise AssertionError("a host read inside the step")

    def bincount(self, ids: Array, minlength: int) -> Array:
        return far(super().bincount(ids, minlength))

    def gate(self, logits: Array, bias: Array | None, valid: Array | None, *, rule: Rule) -> Gate:
        return Gate(*far(tuple(super().gate(logits, bias, valid, rule=rule))))

    def expert_ffn(self, rows: Array, weights: ExpertWeights, offsets: Array, activation: str, limit: float = 0.0) -> tuple[Array, Any]:
        y, saved = super().expert_ffn(rows, weights, np.asarray(offsets), activation, limit)
        return far(y), saved

    def expert_ffn_backward(
        self, dy: Array, saved: Any, activation: str, limit: float = 0.0, out: ExpertWeights | None = None, accumulate: bool = False
    ) -> tuple[Array, ExpertWeights]:
        drows, gradients = super().expert_ffn_backward(dy, saved, activation, limit, out, accumulate)
        return far(drows), ExpertWeights(*far(tuple(gradients)))


# ---- the tests ------------------------------------------------------------------------------------------------------------------------

REFERENCE = NumpyBackend()
SIZES = [(1, 4, 1), (31, 8, 2), (33, 8, 8), (33, 4, 2), (1, 8, 8), (31, 4, 4), (33, 8, 1), (7, 33, 2), (5, 70, 70)]


@pytest.fixture(scope="module", params=ORDERS)
def cuda_gate(request: pytest.FixtureRequest) -> CudaGate:
    return CudaGate(request.param)


def assert_close(given: Array, expected: Array, what: str = "") -> None:
    """1e-6 in float32, 1e-13 in float64, of the largest expected number or of one."""
    assert (given.dtype, given.shape) == (expected.dtype, expected.shape), what
    scale = max(1.0, float(np.max(np.abs(expected), initial=0.0)))
    tolerance = (1e-6 if expected.dtype == np.float32 else 1e-13) * scale
    np.testing.assert_allclose(given, expected, rtol=0.0, atol=tolerance, err_msg=what)


def assert_same_gate(given: Gate, expected: Gate) -> None:
    np.testing.assert_array_equal(given.ids, expected.ids)
    np.testing.assert_array_equal(given.counts, expected.counts)
    for name in ("weights", "scores", "prob_sum"):
        assert_close(getattr(given, name), getattr(expected, name), name)


def softmax_topk(backend: Backend, logits: Array, k: int, norm: bool = True) -> Gate:
    return backend.gate(logits, None, None, rule=Rule("softmax_topk", k, norm))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("n, e, k", SIZES)
def test_the_cuda_gate_agrees_with_the_reference_in_every_thread_order(cuda_gate: CudaGate, n: int, e: int, k: int, norm: bool) -> None:
    logits = np.random.default_rng(n + e + k).normal(size=(n, e)).astype(np.float32)
    assert_same_gate(softmax_topk(cuda_gate, logits, k, norm), softmax_topk(REFERENCE, logits, k, norm))


def test_thread_order_does_not_change_a_bit_of_the_gate() -> None:
    logits = np.random.default_rng(0).normal(size=(33, 8)).astype(np.float32)
    first, *others = (softmax_topk(CudaGate(order), logits, 2) for order in ORDERS)
    for other in others:
        for given, expected in zip(other, first, strict=True):
            np.testing.assert_array_equal(given, expected)


def test_equal_logits_go_to_the_lowest_experts(cuda_gate: CudaGate) -> None:
    logits = np.zeros((3, 40), np.float32)
    logits[1, [35, 3, 34]] = 2.0
    logits[2, :] = -np.arange(40) // 3
    gate = softmax_topk(cuda_gate, logits, 3)
    np.testing.assert_array_equal(gate.ids, [[0, 1, 2], [3, 34, 35], [0, 1, 2]])
    assert_same_gate(gate, softmax_topk(REFERENCE, logits, 3))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # inf - inf, in the reference
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_keeps_its_ids_in_range(cuda_gate: CudaGate, bad: float) -> None:
    logits = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    logits[1, 3] = bad
    logits[3, :] = bad
    gate, expected = softmax_topk(cuda_gate, logits, 2), softmax_topk(REFERENCE, logits, 2)
    assert gate.ids.min() >= 0 and gate.ids.max() < 8 and gate.counts.sum() == 10
    np.testing.assert_array_equal(gate.ids, expected.ids)
    for given, wanted in zip(gate, expected, strict=True):
        np.testing.assert_allclose(given, wanted, atol=1e-6)


@pytest.mark.parametrize(
    "router, dtype, padded, n",
    [
        ("switch", np.float32, False, 5),
        ("softmax_topk", np.float64, False, 5),
        ("softmax_topk", np.float32, True, 5),
        ("softmax_topk", np.float32, False, 0),
    ],
)
def test_what_the_cuda_gate_does_not_cover_is_the_reference(
    cuda_gate: CudaGate, router: str, dtype: type, padded: bool, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_gate, "_launch", None)
    logits: Array = np.random.default_rng(2).normal(size=(n, 4)).astype(dtype)
    valid = np.arange(n) % 2 == 0 if padded else None
    rule = Rule(router, 1)
    assert_same_gate(cuda_gate.gate(logits, None, valid, rule=rule), REFERENCE.gate(logits, None, valid, rule=rule))


def routed(n: int, e: int, k: int, dtype: str, bias: bool, swiglu: bool, capacity: int | None) -> tuple[Any, ...]:
    """x, gate weights, plan, expert weights, dy; every third token is padding where a capacity is given."""
    rng = np.random.default_rng(n + e + k)
    x, dy, logits = (rng.normal(size=(n, width)).astype(dtype) for width in (D, D, e))
    valid = None if capacity is None else np.arange(n) % 3 != 1
    gate = REFERENCE.gate(logits, None, valid, rule=Rule("softmax_topk", k))
    plan = REFERENCE.route(gate.ids, gate.weights, valid, n_experts=e, rows=n * k, capacity=capacity)
    o = 2 * H if swiglu else H
    shapes = ((e, o, D), (e, D, H), (e, o), (e, D)) if bias else ((e, o, D), (e, D, H))
    weights = ExpertWeights(*(rng.normal(size=shape).astype(dtype) for shape in shapes))
    return x, gate.weights, plan, weights, dy


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "activation, limit, bias",
    [("swiglu", 0.0, False), ("swiglu", 0.7, True), ("gelu", 0.0, True), ("gelu_tanh", 0.0, False), ("relu", 0.0, True)],
)
@pytest.mark.parametrize("n, e, k, capacity", [(1, 4, 1, None), (31, 8, 2, 5), (33, 8, 8, None), (33, 4, 2, 9), (0, 4, 2, None)])
def test_the_fused_numba_experts_agree_with_the_reference_forward_and_backward(
    n: int, e: int, k: int, capacity: int | None, activation: str, limit: float, bias: bool, dtype: str
) -> None:
    x, gate_weights, plan, weights, dy = routed(n, e, k, dtype, bias, activation == "swiglu", capacity)
    results = []
    for backend in (NumbaExperts(), REFERENCE):
        y, saved = backend.moe_ffn(x, gate_weights, plan, weights, activation, limit)
        dx, dgate, dweights = backend.moe_ffn_backward(dy, saved, activation, limit)
        results.append((y, dx, dgate, *(d for d in dweights if d is not None)))
    assert len(results[0]) == len(results[1]) == (7 if bias else 5)
    for given, expected in zip(*results, strict=True):
        assert_close(given, expected)


def test_unused_rows_are_not_read_and_come_out_of_the_fused_experts_as_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, plan, weights, _ = routed(31, 8, 2, "float32", True, True, 5)
    rows = REFERENCE.dispatch(x, plan)
    end = plan.offsets[-1]
    assert end < len(rows)
    rows[end:] = np.nan
    monkeypatch.setattr(np, "empty_like", lambda array: np.full_like(array, np.nan))
    results = []
    for backend in (NumbaExperts(), REFERENCE):
        y, saved = backend.expert_ffn(rows, weights, plan.offsets, "swiglu")
        drows, dweights = backend.expert_ffn_backward(rows, saved, "swiglu")
        assert not y[end:].any() and not drows[end:].any()
        results.append((y, drows, *dweights))
    for given, expected in zip(*results, strict=True):
        assert_close(given, expected)


@pytest.mark.parametrize("backend", [NumbaExperts(), CudaGate(), AllThree()], ids=lambda backend: backend.name)
def test_a_routed_layer_takes_the_same_step_on_every_side(backend: Backend) -> None:
    """Output, losses, counts and all gradients; with both overrides nothing is read on the host."""
    steps = []
    for b in (backend, REFERENCE):
        layer = MoE(D, H, moe=MoEConfig(n_experts=8, top_k=2, router="softmax_topk"), std=0.5, backend=b)
        x = tensor(np.random.default_rng(3).normal(size=(3, 11, D)), requires_grad=True, dtype="float32", backend=b)
        y, stats = layer(x)
        ((y * y).sum() + stats.loss).backward()
        assert stats.ids.shape == (33, 2)
        steps.append((y.data, stats.loss.data, stats.counts, stats.ids, x.grad, *(p.grad for p in layer.parameters())))
    for given, expected in zip(*steps, strict=True):
        assert_close(np.asarray(given), np.asarray(expected))


@pytest.mark.parametrize("fallback", ["expert_ffn", "host"])
def test_a_host_read_inside_the_step_is_found(fallback: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the reference's loop over experts, or by a look at one number of the plan."""
    if fallback == "expert_ffn":
        monkeypatch.setattr(AllThree, "expert_ffn", Backend.expert_ffn)
    else:
        monkeypatch.setattr(AllThree, "dispatch", lambda self, x, plan: x[: int(plan.offsets[-1])])
    layer = MoE(D, H, moe=MoEConfig(n_experts=4, top_k=2, router="softmax_topk"), backend=AllThree())
    with pytest.raises(AssertionError, match="a host read inside the step"):
        layer(tensor(np.ones((3, D)), dtype="float32", backend=layer.router.weight.backend))


def test_the_overrides_fit_the_contract_and_are_called_hand_written() -> None:
    for backend, own in ((NumbaExperts(), {"expert_ffn", "expert_ffn_backward"}), (CudaGate(), {"gate"}), (REFERENCE, set())):
        check_overrides(backend)
        kinds = kernel_kinds(backend)
        assert {kernel for kernel, kind in kinds.items() if kind == "hand-written"} == own
        assert "library" not in kinds.values()


def test_a_fused_forward_without_its_backward_is_refused() -> None:
    class Half(NumpyBackend):
        name = "half"
        expert_ffn = NumbaExperts.expert_ffn

    with pytest.raises(UserError, match="override both or none"):
        check_overrides(Half())


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RuntimeError, match="g\\+\\+ is needed"):
        CudaGate()
