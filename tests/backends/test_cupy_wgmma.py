"""Grouped products on Hopper's wgmma, executed as PTX with descriptors, swizzle, mbarriers and fences; what NVRTC makes of it."""

import re
import sys
from types import ModuleType, SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from grouped_products import SPLITS, check_rows, check_weights, close, draw, wide
from ptx_machine.arrays import HostArrays
from ptx_machine.assembled import compile_for
from ptx_machine.cupy_on_ptx import PtxLoader
from ptx_machine.schedules import EVERY_SCHEDULE, SEEDS

from minimoe.reference.expert import ExpertWeights
from minimoe.reference.routing import Plan
from minimoe_cupy import device, grouped
from minimoe_cupy.expert import CudaExpert
from minimoe_cupy.grouped import BFLOAT16, FLOAT32, TILINGS, WGMMA, WGMMA_LARGE

WIDE, NARROW = WGMMA
MMA_AND_FLOAT = [
    pytest.param(tiling, dtype, id=f"{tiling.source.file}, {tiling.height} x {tiling.width}")
    for dtype in (BFLOAT16, FLOAT32)
    for tiling in TILINGS[dtype][:2]
]


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


# ---- products ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPLITS)
@pytest.mark.parametrize("transpose", [False, True])
def test_products_of_rows_are_the_references(backend, kind, transpose):
    check_rows(backend, kind, transpose)


@pytest.mark.parametrize("kind", SPLITS)
@pytest.mark.parametrize("accumulate", [False, True])
def test_weight_gradients_are_the_references(backend, kind, accumulate):
    check_weights(backend, kind, accumulate)


@pytest.mark.parametrize("kind", SPLITS)
@pytest.mark.parametrize("tiling, dtype", MMA_AND_FLOAT)
def test_other_tilings_at_sizes_that_go_round_their_stages(seed, tiling, dtype, kind):
    backend = OnWgmma(seed, tiling)
    for flag in (False, True):
        check_rows(backend, kind, flag, dtype)
        check_weights(backend, kind, flag, dtype)


def check_layer(backend, activation, limit, bias):
    """A routed layer and its gradients are those of mma.sync in small tiles."""
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


@pytest.mark.parametrize("activation, limit, bias", [("swiglu", 0.0, False), ("swiglu", 1.5, True), ("gelu", 0.0, True)])
def test_a_routed_layer_and_its_gradients_are_those_of_mma_sync(backend, activation, limit, bias):
    check_layer(backend, activation, limit, bias)


def plan_of(tokens, slots):
    """The plan of a batch whose every seventh slot goes to expert 2, the others to 0 and 2: expert 1 has none."""
    ids = np.where(np.arange(tokens * slots).reshape(tokens, slots) % 7 == 0, 2, np.array([0, 2])).reshape(-1)
    order = np.argsort(ids, kind="stable").astype(np.int32)
    inverse = np.argsort(order).reshape(tokens, slots).astype(np.int32)
    return Plan(order, inverse, np.searchsorted(ids[order], range(4)).astype(np.int32))


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
