"""The backend `numba-cuda`, executed on the processor: kernels in random schedules, all rungs, a model's training, what is refused."""

import importlib
import json
import pkgutil
import sys
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from fresh_process import first_words
from numba.cuda.dispatcher import CUDADispatcher
from numba.cuda.typing.typeof import typeof
from ptx_machine.arrays import HostArrays, Namespace
from ptx_machine.numba_on_ptx import NumbaCudaOnPtx
from ptx_machine.nvvm import ARCHITECTURES, compile_for
from ptx_machine.schedules import EVERY_SCHEDULE, SEEDS

import minimoe_numba_cuda
from minimoe.backend import BackendUnavailable, check_overrides, describe, kernel_kinds, kernel_names, overridden
from minimoe.reference.gating import Rule
from minimoe.reference.routers import ROUTERS
from minimoe.reference.routing import Plan
from minimoe.study.backends import show_backends
from minimoe.testing import cases
from minimoe.testing.conformance import to_device
from minimoe.testing.kernels import EXAMPLES, Run
from minimoe.testing.training import check_curve
from minimoe_numba_cuda import attention, gating, products, routing
from minimoe_numba_cuda.kernels import NumbaCudaKernels
from minimoe_numba_cuda.launch import THREADS, blocks_of
from minimoe_numba_cuda.launcher import Launcher, Memory, stream_at
from minimoe_numpy import NumpyBackend

BACKENDS = {seed: NumbaCudaOnPtx(seed) for seed in SEEDS}
FIRST, NUMPY = BACKENDS[SEEDS[0]], NumpyBackend()
LEVELS = ("array layer", "kernels", "gradients")  # that equal inputs give equal bits is in the schedules
EVERY = [case for level in LEVELS for case in cases(FIRST, level=level)]
SINGLE = [case for case in EVERY if ", large" not in case.name and "float64" not in case.name]
OWN = [case for case in SINGLE if case.level == "kernels" and overridden(FIRST, case.kernel)]
ON_A_CARD = {"attention", "attention_backward", "cross_entropy"}  # large examples of these take minutes here, seconds in tests/gpu
LARGE = [
    case for case in EVERY
    if ", large [float32]" in case.name and overridden(FIRST, case.kernel) and case.kernel not in ON_A_CARD
]  # fmt: skip


def run_in(seed, name, kernel):
    next(case for case in cases(BACKENDS[seed], level="kernels", kernel=kernel) if case.name == name).run()


@pytest.mark.parametrize("seed", EVERY_SCHEDULE)
@pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in OWN])
def test_a_kernel_conforms_in_every_schedule(case, seed):
    run_in(seed, case.name, case.kernel)


@pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in LARGE])
def test_a_kernel_conforms_at_large_sizes(case):
    case.run()


@pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in SINGLE if case not in OWN])
def test_what_is_not_overridden_and_what_stands_on_kernels_conforms(case):
    case.run()


@pytest.mark.parametrize("router", ROUTERS)
def test_a_tiny_routed_model_trains_as_on_numpy(router):
    check_curve(FIRST, "float32", f"router {router}")


def test_signatures_are_the_contracts():
    check_overrides(FIRST)


# ---- ladders: the rungs that the backend does not use ------------------------------------------------------------------------------------


def floats(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def naive_gate(launch):
    n, e, k = 131, 11, 3
    z, rule = floats(0, n, e), Rule("softmax_topk", k, norm=True)
    weights, ids, scores = np.empty((n, k), np.float32), np.empty((n, k), np.int32), np.empty((n, e), np.float32)
    launch(gating.gate_by_thread, (blocks_of(n),), (THREADS,), z, int(rule.normalised), weights, ids, scores)
    return (weights, ids, scores), NUMPY.gate(z, None, None, rule=rule)[:3]


def naive_combine(launch):
    n, width, d = 130, 2, 5
    ids, weights = np.random.default_rng(1).integers(-1, 4, (n, width)).astype(np.int32), floats(2, n, width)
    plan = NUMPY.route(ids, weights, None, n_experts=4, rows=n * width)
    rows, y = floats(3, n * width, d), np.empty((n, d), np.float32)
    launch(routing.combine_by_thread, (blocks_of(n),), (THREADS,), rows, plan.inverse, weights, y)
    return (y,), (NUMPY.combine(rows, weights, plan),)


def grouped(kernel, transpose):
    def run(launch):
        rows, experts, depth, width = 75, 3, 21, 37
        offsets = np.array([0, 33, 33, 70], np.int32)  # an expert without a row, and five rows that nobody has
        x, weight = floats(4, rows, depth), floats(5, experts, *((depth, width) if transpose else (width, depth)))
        y = np.empty((rows, width), np.float32)
        if kernel is products.grouped_by_thread:
            grid, block = routing.by_row(rows, width), (THREADS,)
        else:
            grid, block = (blocks_of(rows, products.SIDE) + experts + 1, blocks_of(width, products.SIDE)), products.BLOCK
        launch(kernel, grid, block, x, weight, offsets, int(transpose), y)
        return (y,), (NUMPY.grouped_matmul(x, weight, offsets, transpose),)

    return run


RUNGS = {
    "gate_by_thread": naive_gate,
    "combine_by_thread": naive_combine,
    **{
        f"{kernel.py_func.__name__}{', transposed' if transpose else ''}": grouped(kernel, transpose)
        for kernel in (products.grouped_by_thread, products.grouped_shared)
        for transpose in (False, True)
    },
}


@pytest.mark.parametrize("rung", RUNGS)
def test_a_rung_of_a_ladder_agrees_with_the_reference_in_every_schedule(rung):
    for backend in BACKENDS.values():
        got, expected = RUNGS[rung](backend._launch)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kernel", ["attention", "attention_backward"])
def test_heads_that_are_too_wide_for_tiles_go_through_the_first_rung(kernel, monkeypatch):
    monkeypatch.setattr(attention, "WIDEST", 0)
    for seed in SEEDS:
        run_in(seed, f"{kernel} [float32]", kernel)


# ---- what is refused ---------------------------------------------------------------------------------------------------------------------


def nothing_runs(kernel):
    raise AssertionError(f"{kernel.py_func.__name__} was launched")


class Refusing(NumbaCudaKernels, HostArrays):
    def __init__(self):
        super().__init__(nothing_runs)


REFUSING = Refusing()
F, I = np.float32, np.int32
POSITIONS = {"q_pos": np.zeros((1, 3), I), "k_pos": np.zeros((1, 3), I)}
PLAN = Plan(np.zeros(4, I), np.zeros((2, 2), I), np.array([0, 2, 4], I))
STATES = {"lr": np.array(0.1, F), "step": np.array(1, I), "scale": np.array(1.0, F), "ok": np.array(True)}
ADAMW = {**STATES, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}


def attend(q=(1, 3, 2, 4), k=(1, 3, 2, 4), **options):
    given = {"scale": 1.0, "causal": True, **POSITIONS, **options}
    return lambda b: b.attention(np.zeros(q, F), np.zeros(k, F), np.zeros(k, F), **given)


MALFORMED = {
    "norm, weight": (lambda b: b.rms_norm(floats(0, 3, 4), floats(1, 3), 1e-5), r"rms_norm: weight must have shape \(4\), not \(3,\)"),
    "swiglu, dy of another shape": (lambda b: b.swiglu_backward(floats(0, 3, 4), floats(1, 3, 6)), r"gate_up must have shape \(3, 8\)"),
    "gelu, dy of another shape": (lambda b: b.gelu_backward(floats(0, 3), floats(1, 4)), r"gelu_backward: x and dy differ in shape"),
    "rope, more pairs than a head has": (
        lambda b: b.rope(floats(0, 1, 2, 1, 4), np.zeros((1, 2), I), floats(1, 3)), "inv_freq rotates 3 pairs, heads of 4 have 2",
    ),
    "rope, positions of int64": (
        lambda b: b.rope(floats(0, 1, 2, 1, 4), np.zeros((1, 2), np.int64), floats(1, 2)), "positions must be int32, not int64",
    ),
    "heads that do not fit": (
        lambda b: b.split_heads(floats(0, 1, 2, 10), np.zeros((1, 2), I), None, heads=2, groups=1), r"rows of 10 cannot be cut into 2 \+ 2",
    ),
    "attention, heads": (attend(q=(1, 3, 3, 4)), r"the heads of q \(3\) must be a multiple of those of k \(2\)"),
    "attention, widths": (attend(k=(1, 3, 2, 5)), r"k must have shape \(1, 3, 2, 4\), not \(1, 3, 2, 5\)"),
    "attention, positions of floats": (attend(q_pos=np.zeros((1, 3), F)), "q_pos must be int32, not float32"),
    "attention, k_valid of another length": (attend(k_valid=np.ones((1, 4), bool)), r"k_valid must have shape \(1, 3\)"),
    "gate, top_k": (lambda b: b.gate(floats(0, 3, 4), None, None, rule=Rule("softmax_topk", 5)), r"top_k \(5\) must be 1 to 4"),
    "route, ids of int64": (
        lambda b: b.route(np.zeros((2, 2), np.int64), floats(0, 2, 2), None, n_experts=2, rows=4), "ids must be int32, not int64",
    ),
    "dispatch, tokens": (lambda b: b.dispatch(floats(0, 3, 4), PLAN), r"x must have shape \(2, any\), not \(3, 4\)"),
    "dispatch, order of floats": (lambda b: b.dispatch(floats(0, 2, 4), PLAN._replace(order=floats(0, 4))), "order must be int32"),
    "combine, rows": (lambda b: b.combine(floats(0, 3, 4), floats(1, 2, 2), PLAN), r"rows must have shape \(4, any\), not \(3, 4\)"),
    "combine, dy": (lambda b: b.combine_backward(floats(0, 3, 4), floats(0, 4, 4), floats(1, 2, 2), PLAN), r"dy must have shape \(2, 4\)"),
    "grouped, depth": (
        lambda b: b.grouped_matmul(floats(0, 4, 3), floats(1, 2, 5, 6), PLAN.offsets), r"x must have shape \(any, 6\), not \(4, 3\)",
    ),
    "grouped, offsets": (
        lambda b: b.grouped_matmul(floats(0, 4, 6), floats(1, 2, 5, 6), PLAN.offsets[:2]), r"offsets must have shape \(3\), not \(2,\)",
    ),
    "grouped dw, rows": (lambda b: b.grouped_matmul_dw(floats(0, 4, 6), floats(1, 5, 6), PLAN.offsets), r"dy must have shape \(5, any\)"),
    "loss, targets of int64": (lambda b: b.cross_entropy(floats(0, 3, 4), np.zeros(3, np.int64)), "targets must be int32, not int64"),
    "loss, too few targets": (lambda b: b.cross_entropy(floats(0, 3, 4), np.zeros(2, I)), r"targets must have shape \(3\), not \(2,\)"),
    "scatter_add, integers": (
        lambda b: b.scatter_add(np.zeros((3, 2), I), np.zeros(1, I), np.ones((1, 2), I)), "must be of a floating type, not int32",
    ),
    "adamw, state": (lambda b: b.adamw(floats(0, 8), floats(1, 7), floats(2, 8), floats(3, 8), **ADAMW), r"inout_m must have shape \(8\)"),
    "adamw, parameters with gaps": (
        lambda b: b.adamw(floats(0, 8)[::2], floats(1, 4), floats(2, 4), floats(3, 4), **ADAMW), "inout_param .* must be C-contiguous",
    ),
    "a launch with gaps": (
        lambda b: b._launch(products.grouped_by_thread, (1,), (1,), floats(0, 4, 4).T), "by_thread: argument 0 must be C-contiguous",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MALFORMED)
def test_what_does_not_fit_is_refused_in_one_line_and_nothing_runs(what):
    call, words = MALFORMED[what]
    with pytest.raises((TypeError, ValueError), match=words) as raised:
        call(REFUSING)
    assert "\n" not in str(raised.value)


def test_a_target_that_is_no_column_gives_nan_and_is_not_read():
    total, count, _ = FIRST.cross_entropy(floats(0, 2, 3), np.array([7, 1], I))
    assert np.isnan(total) and count == 2


def test_ids_rows_and_offsets_out_of_range_read_and_write_nothing():
    plan = FIRST.route(np.array([[0, 9]], I), floats(0, 1, 2), None, n_experts=2, rows=2)
    assert plan.inverse.tolist() == [[0, -1]] and plan.offsets.tolist() == [0, 1, 1]
    outside = Plan(np.array([99, 0, 0, 0], I), np.array([[99, -1], [1, 1]], I), np.array([0, 2, 4], I))
    rows = FIRST.dispatch(floats(0, 2, 3), outside)
    assert not rows[0].any() and rows[1].all()
    y = FIRST.combine(floats(0, 4, 3), floats(1, 2, 2), outside)
    assert not y[0].any() and y[1].all()
    drows, dweights = FIRST.combine_backward(floats(0, 2, 3), floats(1, 4, 3), floats(2, 2, 2), outside)
    assert dweights[0].tolist() == [0.0, 0.0] and drows[1].all()
    far, x = np.array([0, 2, 99], I), floats(0, 4, 3)
    assert np.isfinite(FIRST.grouped_matmul(x, floats(1, 2, 5, 3), far)).all()
    assert np.isfinite(FIRST.grouped_matmul_dw(x, x, far)).all() and np.isfinite(FIRST.grouped_bias_backward(x, far)).all()


class Grids(NumbaCudaKernels, HostArrays):
    """Runs nothing: keeps the grids that would be launched."""

    def __init__(self):
        self.grids = []
        super().__init__(lambda kernel: self)

    def __getitem__(self, shape):
        self.grids.append(shape[0])
        return lambda *args: None


def test_rows_of_grouped_products_may_need_more_tiles_than_a_grid_has_blocks_in_its_second_direction():
    backend, rows = Grids(), 65_536 * products.TILE
    backend.grouped_matmul(np.zeros((rows, 1), F), floats(0, 2, 3, 1), np.array([0, 1, rows], I))
    assert backend.grids == [(65_536 + 3, 1)]


# ---- without a card ------------------------------------------------------------------------------------------------------------------


def test_kernels_are_listed_without_a_device_and_it_says_why_it_does_not_run():
    found = describe("numba-cuda")
    assert not found.available and found.why_not.startswith("backend numba-cuda: ")
    assert found.kernels["attention"] == found.kernels["combine_backward"] == "hand-written" and found.kernels["muon"] == "reference"


class Device(SimpleNamespace):
    """An array of CuPy's, as far as the launcher looks at it."""

    def __init__(self, *shape, dtype=np.float32):
        super().__init__(shape=shape, size=int(np.prod(shape)), dtype=np.dtype(dtype), data=SimpleNamespace(ptr=4096))


@pytest.mark.parametrize("shape, dtype", [((3, 4), np.float32), ((1,), np.int64), ((2, 0), np.bool_)])
def test_numba_sees_a_cards_array_as_one_of_the_host_and_no_stream_to_wait_for(shape, dtype):
    memory = Launcher(Device(1)).argument(Device(*shape, dtype=dtype))
    assert isinstance(memory, Memory) and typeof(memory) == typeof(np.zeros(shape, dtype))
    assert "stream" not in memory.__cuda_array_interface__ and not hasattr(memory, "__dlpack__")
    assert memory.__cuda_array_interface__["data"] == (4096, False)


def test_a_launch_hands_over_its_shape_and_numbers_as_they_are():
    seen = []
    kernel = type("Kernel", (), {"__getitem__": lambda _, shape: lambda *args: seen.append((shape, args))})()
    Launcher(Device(1))(kernel)[(2, 3), (128,), 0, 64](np.float32(0.5), 7)
    assert seen == [(((2, 3), (128,), 0, 64), (np.float32(0.5), 7))]


def test_a_stream_is_named_as_numba_takes_it():
    assert stream_at(0) == 0 and int(stream_at(4096).handle) == 4096


# ---- compiled for a card -------------------------------------------------------------------------------------------------------------


class Zeros(Namespace):
    empty = staticmethod(np.zeros)


class Noting(NumbaCudaKernels, HostArrays):
    """Runs nothing: notes which kernels would be launched, and with what types."""

    dtypes = ("float32", "float64")
    xp = Zeros()

    def __init__(self):
        self.noted = {}
        super().__init__(self.note)

    def note(self, kernel):
        def launch(*args):
            self.noted.setdefault(kernel, set()).add(tuple(typeof(argument) for argument in args))

        return type("Configured", (), {"__getitem__": lambda *_: launch})()


@cache
def launched():
    """Every kernel with the argument types that its examples, and the rungs, give it."""
    backend = Noting()
    with np.errstate(all="ignore"), pytest.MonkeyPatch.context() as patch:
        for widest in (attention.WIDEST, 0):
            patch.setattr(attention, "WIDEST", widest)
            for kernel in filter(lambda name: overridden(backend, name), kernel_names()):
                for example in EXAMPLES[kernel]():
                    args, options = to_device(backend, (example.args, example.options), "float32")
                    Run(backend, kernel, "float32", example).call(backend, args, options)
    for rung in RUNGS.values():
        rung(backend._launch)
    return backend.noted


def kernels():
    """Every kernel of the package, by name."""
    names = [info.name for info in pkgutil.iter_modules(minimoe_numba_cuda.__path__) if info.name != "device"]  # which needs CuPy
    modules = [importlib.import_module(f"minimoe_numba_cuda.{name}") for name in names]
    found = {name: value for module in modules for name, value in vars(module).items() if isinstance(value, CUDADispatcher)}
    return {name: value for name, value in found.items() if not value.targetoptions.get("device")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", kernels())
def test_a_kernel_compiles_without_spills_local_memory_or_float64(name, architecture):
    kernel = kernels()[name]
    for kinds in launched()[kernel]:
        made = compile_for(kernel, kinds, architecture)
        assert (made.stack, made.spilled) == (0, 0), f"{made.stack} bytes of local memory, {made.spilled} spilled"
        assert ".f64" not in made.ptx, "it computes in float64"


# ---- without the package -----------------------------------------------------------------------------------------------------------------

PLAIN_INSTALL = {
    "Numba has an older numba.cuda": "sys.meta_path[:] = [finder for finder in sys.meta_path if 'NumbaCuda' not in type(finder).__name__]",
    "Numba has none": "sys.modules['numba.cuda'] = None",
}


@pytest.mark.parametrize("hide", PLAIN_INSTALL.values(), ids=PLAIN_INSTALL)
def test_a_plain_install_lists_the_same_kernels(hide):
    absent = "sys.modules['cupy'] = sys.modules['numba_cuda'] = None"
    words = first_words(code=f"import sys\n{absent}\n{hide}\nfrom minimoe.cli import main\nmain(['backends', '--json'])")
    found = json.loads(words)["numba-cuda"]
    assert found["kernels"] == kernel_kinds(NumbaCudaKernels) and "hand-written" in found["kernels"].values()
    assert not found["available"] and "is not installed" in found["why_not"] and found["proven"] == {}


def test_numba_cuda_that_fails_to_be_imported_is_a_reason(monkeypatch):
    monkeypatch.setattr("minimoe_cupy.device.check_device", lambda name: None)
    monkeypatch.setattr("minimoe_numba_cuda.find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "numba.cuda", None)
    monkeypatch.delattr("numba.cuda")
    with pytest.raises(BackendUnavailable, match=r"Numba-CUDA cannot be imported \(.*\): pip install 'numba-cuda"):
        minimoe_numba_cuda.backend()


def test_kernels_that_no_card_has_run_are_listed_as_executed_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(NumbaCudaKernels, "proven", {"gate": "on an H200, 2026-11-30"})
    show_backends()
    out = " ".join(capsys.readouterr().out.split())
    assert "numba-cuda, hand-written, executed as PTX on a CPU, proven on an H200, 2026-11-30: gate " in out
    assert "numba-cuda, hand-written, executed as PTX on a CPU, unproven on a card: " in out
    assert describe("cupy").emulated == describe("numba-cuda").emulated == "executed as PTX on a CPU"
