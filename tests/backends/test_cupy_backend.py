"""The backend `cupy`, executed on the processor: every kernel in random schedules, a model's training, and what is refused."""

import re
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from ptx_machine.cupy_on_ptx import CupyOnPtx
from ptx_machine.schedules import EVERY_SCHEDULE, SEEDS

import minimoe as mm
import minimoe_cupy
from minimoe.backend import BackendUnavailable, check_overrides, kernel_kinds, overridden
from minimoe.hints import install
from minimoe.reference.routers import ROUTERS
from minimoe.reference.routing import Plan
from minimoe.testing import cases
from minimoe.testing.training import check_curve, expected_curve, train
from minimoe_cupy.device import REQUIRED, check_device
from minimoe_cupy.launch import lanes, parameters, writable
from minimoe_cupy.loader import Source

BACKENDS = {seed: CupyOnPtx(seed) for seed in SEEDS}
FIRST = BACKENDS[SEEDS[0]]
KERNELS = [case for case in cases(FIRST, level="kernels") if overridden(FIRST, case.kernel) and "float64" not in case.name]
OWN = [case for case in KERNELS if ", large" not in case.name]
BFLOAT16_CURVE = 0.02
ON_A_CARD = {"attention", "attention_backward", "cross_entropy"}  # large examples of these take minutes here, seconds in tests/gpu
LARGE = [case for case in KERNELS if ", large" in case.name and case.kernel not in ON_A_CARD]


@pytest.mark.parametrize("seed", EVERY_SCHEDULE)
@pytest.mark.parametrize("index", [pytest.param(i, id=str(case)) for i, case in enumerate(OWN)])
def test_a_kernel_conforms_in_every_schedule(index, seed):
    wanted = OWN[index]
    next(case for case in cases(BACKENDS[seed], level="kernels", kernel=wanted.kernel) if case.name == wanted.name).run()


@pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in LARGE])
def test_a_kernel_conforms_at_large_sizes(case):
    case.run()


# That equal inputs give equal bits is in the schedules. What has no kernel here is computed by the reference, on NumPy.
UPPER = ("array layer", "gradients", "curve")
OTHERS = [case for level in UPPER for case in cases(FIRST, level=level) if "float64" not in case.name]


@pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in OTHERS])
def test_what_is_not_overridden_and_what_stands_on_kernels_conforms(case):
    case.run()


@pytest.mark.parametrize("router", ROUTERS)
def test_a_tiny_routed_model_trains_as_on_numpy(router):
    check_curve(FIRST, "float32", f"router {router}")


@pytest.mark.parametrize("router", ROUTERS)
def test_a_tiny_model_of_bfloat16_trains_nearly_as_on_numpy(router):
    """Its loss stays near that of NumPy's float64: products are rounded to 8 bits, and a choice of experts may flip."""
    got, expected = train(FIRST, "bfloat16", f"router {router}")[:, 0], expected_curve(f"router {router}")[:, 0]
    assert np.abs(got / expected - 1).max() < BFLOAT16_CURVE


def test_a_class_of_kernels_lies_in_the_file_of_its_name():
    classes = {base for base in minimoe_cupy.CudaKernels.__mro__ if base.__name__.startswith("Cuda")} - {minimoe_cupy.CudaKernels}
    assert classes and {base.__module__: base.__name__ for base in classes} == {
        f"minimoe_cupy.{base.__name__.removeprefix('Cuda').lower()}": base.__name__ for base in classes
    }


def test_signatures_are_the_contracts():
    check_overrides(FIRST)


def test_an_output_buffer_that_a_kernel_cannot_write_is_filled_by_the_reference():
    x, weight, offsets = np.ones((3, 4), np.float32), np.ones((1, 5, 4), np.float32), np.array([0, 3], np.int32)
    assert writable(None, (3, 5), x.dtype) and writable(np.empty((3, 5), np.float32), (3, 5), x.dtype)
    for out in (np.zeros((3, 10), np.float32)[:, ::2], np.zeros((3, 5), np.float64)):
        assert not writable(out, (3, 5), x.dtype)
        assert FIRST.grouped_matmul(x, weight, offsets, out=out) is out and (out == 4).all()
        out[...] = 0
        assert FIRST.linear(x, weight[0], out=out) is out and (out == 4).all()
    assert not writable(np.empty((5, 3), np.float32), (3, 5), x.dtype)


def test_a_parameter_of_an_odd_size_leaves_wide_accesses_to_those_after_it():
    sizes = [(3,), (8,), (5,), (4, 8)]
    leaves = [mm.tensor(np.ones(shape, np.float32), requires_grad=True, backend=FIRST, dtype="float32") for shape in sizes]
    optimizer = mm.optim.AdamW(leaves)
    assert [lanes(8, leaf.data, leaf.grad) for leaf in leaves] == [4, 4, 4, 4]
    assert [state.shape for name, state in optimizer.state_dict().items() if name.endswith(".m")] == [(16,), (32,)]


# ---- what is refused ---------------------------------------------------------------------------------------------------------------------


def plan_of(*, order=(0, 1), inverse=((0,), (1,)), offsets=(0, 2)):
    return Plan(*(np.array(part, np.int32) for part in (order, inverse, offsets)))


@pytest.mark.parametrize(
    "x, plan, words",
    [
        (np.zeros((2, 4), np.float32), plan_of(inverse=[[0.0], [1.0]])._replace(inverse=np.zeros((2, 1))), "inverse is float64"),
        (np.zeros((2, 4), np.float32), plan_of()._replace(inverse=[[0], [1]]), "inverse"),
    ],
)
def test_an_array_that_does_not_fit_a_kernels_declaration_is_refused(x, plan, words):
    with pytest.raises((TypeError, AttributeError), match=words):
        FIRST.dispatch(x, plan)


def test_a_launch_takes_contiguous_arrays_only():
    source, name = minimoe_cupy.dispatch.DISPATCH, "dispatch<float, 1>"
    x, plan = np.zeros((4, 4), np.float32), plan_of()
    with pytest.raises(TypeError, match=r"dispatch<float, 1>: x is float32\[4, 4\], not contiguous: wanted a contiguous array of float32"):
        FIRST._launch(source, name, 1, 256, x.T, plan.inverse, x, 2, 1, 4)


def test_parameters_are_read_from_the_declaration():
    found = parameters(minimoe_cupy.dispatch.COMBINE, "combine<bf16, 2, 8>")
    assert [(p.name, str(p.dtype), p.pointer) for p in found] == [
        ("rows", "bfloat16", True), ("weights", "float32", True), ("inverse", "int32", True), ("y", "bfloat16", True),
        ("n_tokens", "int32", False), ("width", "int32", False), ("d_model", "int32", False),
    ]  # fmt: skip
    with pytest.raises(LookupError, match=r"combine.cu declares no kernel combined"):
        parameters(Source("combine.cu", ()), "combined<float>")


# ---- without a card ------------------------------------------------------------------------------------------------------------------


class NoDriver(Exception):
    pass


def fake_cupy(monkeypatch, count=1, error=None, capability=(9, 0), nvrtc=(13, 0)):
    def get_count():
        if error:
            raise error
        return count

    def get_version():
        if isinstance(nvrtc, Exception):
            raise nvrtc
        return nvrtc

    runtime = SimpleNamespace(
        CUDARuntimeError=NoDriver, getDeviceCount=get_count, getDevice=lambda: 0,
        getDeviceProperties=lambda _: {"name": b"Some Card", "major": capability[0], "minor": capability[1]},
    )  # fmt: skip
    module = ModuleType("cupy")
    module.cuda = SimpleNamespace(runtime=runtime, nvrtc=SimpleNamespace(getVersion=get_version))
    module.__spec__ = SimpleNamespace(name="cupy")
    monkeypatch.setitem(sys.modules, "cupy", module)
    for name in ("cupy_backends", "cupy_backends.cuda", "cupy_backends.cuda.libs"):
        package = ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    for part in REQUIRED:
        if part not in sys.modules:
            monkeypatch.setitem(sys.modules, part, ModuleType(part))


def test_a_part_that_is_missing_is_named(monkeypatch):
    fake_cupy(monkeypatch)
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs.nvrtc", None)
    with pytest.raises(BackendUnavailable, match=r"backend cupy: NVRTC is missing .*: " + re.escape(install("cupy"))):
        check_device("cupy")


@pytest.mark.parametrize(
    "fake, words",
    [
        ({"error": NoDriver("insufficient driver")}, r"backend cupy: no usable NVIDIA driver \(insufficient driver\): install one"),
        ({"count": 0}, "no NVIDIA card is visible"),
        ({"capability": (7, 5)}, r"Some Card has compute capability 7.5: the kernels need 8.0 \(Ampere\) or newer"),
    ],
)
def test_a_machine_without_a_fitting_card_says_what_is_missing(monkeypatch, fake, words):
    fake_cupy(monkeypatch, **fake)
    with pytest.raises(BackendUnavailable, match=words):
        check_device("cupy")


def test_without_cupy_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BackendUnavailable, match=r"CuPy is not installed: " + re.escape(install("cupy"))):
        check_device("cupy")


def test_a_fitting_card_passes(monkeypatch):
    fake_cupy(monkeypatch)
    check_device("cupy")


@pytest.mark.parametrize("name", ["cupy", "numba-cuda"])
def test_an_older_nvrtc_is_refused_by_name(monkeypatch, name):
    fake_cupy(monkeypatch, nvrtc=(12, 6))
    words = rf"backend {name}: NVRTC 12\.6 is too old, the kernels need 12\.8 or newer: pip install 'nvidia-cuda-nvrtc-cu12>=12\.8'"
    with pytest.raises(BackendUnavailable, match=words):
        check_device(name)


@pytest.mark.parametrize("version", [(12, 8), (12, 10), (13, 0)])
def test_the_oldest_nvrtc_that_is_tested_and_newer_ones_pass(monkeypatch, version):
    fake_cupy(monkeypatch, nvrtc=version)
    check_device("cupy")


def test_a_library_of_nvrtc_that_is_missing_is_named(monkeypatch):
    fake_cupy(monkeypatch, nvrtc=RuntimeError("no libnvrtc.so.12"))
    with pytest.raises(BackendUnavailable, match=re.escape(f"backend cupy: NVRTC is missing (no libnvrtc.so.12): {install('cupy')}")):
        check_device("cupy")


def test_kernels_are_listed_without_a_device():
    kinds = kernel_kinds(minimoe_cupy.backend_class())
    assert kinds["dispatch"] == kinds["combine_backward"] == "hand-written" and kinds["muon"] == "reference"
