"""Grouped products on Hopper's wgmma, executed as PTX with descriptors, swizzle, mbarriers and fences; what NVRTC makes of it."""

import re
import sys
from types import ModuleType, SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from ptx_machine.arrays import HostArrays
from ptx_machine.assembled import compile_for
from ptx_machine.cupy_on_ptx import PtxLoader
from ptx_machine.machine import unwritten
from ptx_machine.schedules import EVERY_SCHEDULE, SEEDS

from minimoe.reference.expert import ExpertWeights
from minimoe.reference.routing import Plan
from minimoe_cupy import device, grouped
from minimoe_cupy.expert import CudaExpert
from minimoe_cupy.grouped import BFLOAT16, FLOAT32, TILINGS, WGMMA, WGMMA_LARGE
from minimoe_cupy.loader import KERNELS
from minimoe_numpy import NumpyBackend

KERNEL = KERNELS / "grouped_wgmma.cu"
TOLERANCE = 2.0**-7  # of the largest value: sums in float32, results rounded to bfloat16
WIDE, NARROW = WGMMA
SPLITS = {  # of rows among experts; the last number is how many there are
    "ragged": ([0, 70, 133, 134, 140], 140),
    "empty and overfull experts, unused rows": ([0, 0, 129, 129, 129], 137),
    "nothing used": ([0, 0, 0, 0, 0], 5),
}


class OnWgmma(CudaExpert, HostArrays):
    """A backend whose products all go to one tiling."""

    name = "wgmma"

    def __init__(self, seed, tiling):
        self.loader, self.tiling = PtxLoader(seed), tiling

    def _tiling(self, dtype, vector, *others):
        return self.tiling if vector else super()._tiling(dtype, vector, *others)


MMA_SYNC = OnWgmma(SEEDS[0], TILINGS[BFLOAT16][1])


@pytest.fixture(params=EVERY_SCHEDULE)
def seed(request):
    return request.param


@pytest.fixture(params=[pytest.param(WIDE, id="256"), pytest.param(NARROW, id="128")])
def backend(seed, request):
    return OnWgmma(seed, request.param)


def draw(seed, *shape):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32).astype(ml_dtypes.bfloat16)


def split(kind):
    offsets, rows = SPLITS[kind]
    return np.array(offsets, np.int32), rows


def poisoned(x, offsets):
    x[offsets[-1] :] = np.nan
    return x


def wide(x):
    return None if x is None else x.astype(np.float32) if x.dtype == BFLOAT16 else x


def close(got, wanted):
    got, wanted = wide(got), wide(wanted)
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE * max(1.0, float(np.abs(wanted).max(initial=0))))


# ---- products ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPLITS)
@pytest.mark.parametrize("transpose", [False, True])
def test_products_of_rows_are_the_references(backend, kind, transpose):
    offsets, rows = split(kind)
    inner, outer = (72, 264) if kind == "ragged" else (328, 136)  # within a stage, and round all of them
    x, weight = poisoned(draw(1, rows, inner), offsets), draw(2, 4, *((inner, outer) if transpose else (outer, inner)))
    y = backend.grouped_matmul(x, weight, offsets, transpose)
    close(y, NumpyBackend().grouped_matmul(wide(x), wide(weight), offsets, transpose))
    assert not np.any(wide(y)[offsets[-1] :])


@pytest.mark.parametrize("kind", SPLITS)
@pytest.mark.parametrize("accumulate", [False, True])
def test_weight_gradients_are_the_references(backend, kind, accumulate):
    offsets, rows = split(kind)
    dy, x = poisoned(draw(1, rows, 136), offsets), poisoned(draw(2, rows, 264), offsets)
    before = draw(3, 4, 136, 264)
    out = before.copy()
    backend.grouped_matmul_dw(dy, x, offsets, out, accumulate)
    wanted = NumpyBackend().grouped_matmul_dw(wide(dy), wide(x), offsets)
    close(out, wanted + wide(before) if accumulate else wanted)


@pytest.mark.parametrize("activation, limit, bias", [("swiglu", 0.0, False), ("swiglu", 1.5, True), ("gelu", 0.0, True)])
def test_a_routed_layer_and_its_gradients_are_those_of_mma_sync(backend, activation, limit, bias):
    tokens, slots, experts, d, h = 75, 2, 3, 72, 136
    plan, gates = plan_of(tokens, slots), np.abs(wide(draw(6, tokens, slots)))
    up, small = (2 if activation == "swiglu" else 1) * h, ml_dtypes.bfloat16(0.125)
    biases = (draw(3, experts, up), draw(4, experts, d)) if bias else (None, None)
    weights = ExpertWeights(draw(1, experts, up, d) * small, draw(2, experts, d, h) * small, *biases)
    x, dy = draw(5, tokens, d), draw(7, tokens, d)

    def layer(backend):
        y, saved = backend.moe_ffn(x, gates, plan, weights, activation, limit)
        dx, dgates, dweights = backend.moe_ffn_backward(dy, saved, activation, limit)
        return y, saved.expert.pre_activation, dx, dgates, *dweights

    for got, wanted in zip(layer(backend), layer(MMA_SYNC), strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            close(got, wanted)


def plan_of(tokens, slots):
    """The plan of a batch whose every seventh slot goes to expert 2, the others to 0 and 2: expert 1 has none."""
    ids = np.where(np.arange(tokens * slots).reshape(tokens, slots) % 7 == 0, 2, np.array([0, 2])).reshape(-1)
    order = np.argsort(ids, kind="stable").astype(np.int32)
    inverse = np.argsort(order).reshape(tokens, slots).astype(np.int32)
    return Plan(order, inverse, np.searchsorted(ids[order], range(4)).astype(np.int32))


# ---- planted bugs ------------------------------------------------------------------------------------------------------------------------

BUGS = {  # what is left out, or replaced
    "copies are not waited for": ("wait_for_copies<DEPTH>();", ""),
    "copies are not shown to the tensor cores": ("fence_proxy_async();", ""),
    "a stage is read before it is full": ("mbarrier_wait(&barriers.full[stage], step / STAGES % 2);", ""),
    "a stage is filled before it is empty": ("mbarrier_wait(&barriers.empty[stage], step / STAGES % 2 ^ 1);", ""),
    "a stage is given back too early": ("wgmma_wait<1>(sum);", "wgmma_wait<2>(sum);"),
    "the last products are not waited for": ("wgmma_wait<0>(sum);", ""),
    "sums are not said to be ready": ("wgmma_fence(sum);", ""),
    "operands are overwritten with sums": ("mbarrier_wait(&barriers.end, 0);", ""),
    "chunks are not exchanged": ("return row * STEP + (chunk ^ row % 8) * CHUNK;", "return row * STEP + chunk * CHUNK;"),
    "another stage is called full": ("warp_arrives(&barriers.full[(step - DEPTH) % STAGES]);", "warp_arrives(&barriers.full[0]);"),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The kernel with all the bugs in it, of which its unused argument `slots` chooses one, and 0 none."""
    folder = tmp_path_factory.mktemp("kernels")
    for header in KERNELS.glob("*.cuh"):
        (folder / header.name).write_text(header.read_text())
    tile = (KERNELS / "wgmma_tile.cuh").read_text().replace("#pragma once", "#pragma once\nstatic int planted;", 1)
    for number, (right, wrong) in enumerate(BUGS.values(), 1):
        assert tile.count(right) == 1, right
        tile = tile.replace(right, f"if (planted == {number}) {{ {wrong} }} else {right}")
    (folder / "wgmma_tile.cuh").write_text(tile)
    kernels = KERNEL.read_text().replace("extern __shared__", "planted = slots;\n    extern __shared__", 1)
    (folder / KERNEL.name).write_text(kernels)
    return folder / KERNEL.name


def run_planted(path, seed, number):
    """Return what is wrong, by the machine or by the product: nothing, if it is right."""
    offsets, (rows, inner, outer) = np.array([0, 70, 140], np.int32), (140, 264, 16)
    x, weight, y, nothing = draw(1, rows, inner), draw(2, 2, outer, inner), unwritten((rows, outer), ml_dtypes.bfloat16), np.uintp(0)
    numbers = [np.int32(n) for n in (rows, 2, inner, outer, 4, 1, 0)]
    arguments = [x, nothing, np.int32(number), weight, nothing, offsets, nothing, y, nothing, *numbers, np.float32(0)]
    kernel = PtxLoader(seed)(path, ["grouped_rows_wgmma<128, 0>"])("grouped_rows_wgmma<128, 0>")
    try:
        kernel((4,), (NARROW.threads,), arguments, shared_mem=NARROW.shared)
    except RuntimeError as error:
        return str(error)
    wanted = NumpyBackend().grouped_matmul(wide(x), wide(weight), offsets)
    return "" if np.abs(wide(y) - wanted).max() <= TOLERANCE * np.abs(wanted).max() else "differs"


def test_without_a_bug_nothing_is_found(planted, seed):
    assert run_planted(planted, seed, 0) == ""


@pytest.mark.parametrize("bug", BUGS)
def test_a_missing_wait_fence_or_exchange_is_found(planted, bug):
    number = list(BUGS).index(bug) + 1
    assert any(run_planted(planted, seed, number) for seed in (0, 1, 2))


# ---- what the compiler makes of it, and when it is used ----------------------------------------------------------------------------------


def test_kernels_compile_for_hopper_without_spills_or_products_that_wait():
    for name, made in compile_for(WGMMA_LARGE.path, WGMMA_LARGE.names, WGMMA_LARGE.architecture).items():
        assert (made.stack, made.spilled, made.remarks) == (0, 0, ()), name
        shape, turned = "m64n256k16.f32.bf16.bf16", (int("dw" in name), int(not re.search("<256, [02]>", name)))
        assert made.ptx.count(f"wgmma.mma_async.sync.aligned.{shape}") == 4, name
        assert made.ptx.count("1, 1, {}, {};}}".format(*turned)) == 4, name
        assert "cp.async.cg.shared.global" in made.ptx and "fence.proxy.async.shared::cta" in made.ptx and "st.global.v4" in made.ptx


@pytest.mark.parametrize(
    "asked, capability, wanted", [("1", (9, 0), True), ("0", (9, 0), False), ("1", (8, 0), False), ("1", (10, 0), False)]
)
def test_wgmma_is_used_where_it_is_asked_for_on_hopper(monkeypatch, asked, capability, wanted):
    properties = dict(zip(("major", "minor"), capability, strict=True))
    cupy = ModuleType("cupy")
    cupy.__spec__ = SimpleNamespace(name="cupy")
    runtime = SimpleNamespace(getDevice=lambda: 0, getDeviceProperties=lambda _: properties)
    cupy.cuda = SimpleNamespace(runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setenv("MINIMOE_WGMMA", asked)
    assert device.wgmma_wanted() == wanted


def test_wgmma_is_off_by_default_and_takes_large_products_of_bfloat16_where_it_is_on(monkeypatch):
    monkeypatch.delenv("MINIMOE_WGMMA", raising=False)
    backend = type("Plain", (CudaExpert, HostArrays), {"name": "plain"})()
    wide_enough, large, small, odd = lambda tiling: (20, 4096 // tiling.width), *TILINGS[BFLOAT16]
    assert not device.wgmma_wanted() and backend._tiling(BFLOAT16, True, wide_enough) == large
    monkeypatch.setattr(grouped, "wgmma_wanted", lambda: True)
    assert backend._tiling(BFLOAT16, True, wide_enough) == WIDE
    assert backend._tiling(BFLOAT16, True, lambda tiling: (20, 1024 // tiling.width)) == NARROW
    assert backend._tiling(BFLOAT16, True, wide_enough, 600, 10) == small
    assert backend._tiling(BFLOAT16, False, wide_enough) == odd
    assert backend._tiling(FLOAT32, True, wide_enough) == TILINGS[FLOAT32][0]
