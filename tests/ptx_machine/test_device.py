"""The machine does what a device does: warp operations, barriers that count, bfloat16, tensor cores, launches, and what is refused."""

import math

import ml_dtypes
import numpy as np
import pytest
from numba import cuda
from numba.cuda import float32, int32

from ptx_machine import build
from ptx_machine.machine import Fault, Module
from ptx_machine.numba_on_ptx import NumbaOnPtx
from ptx_machine.nvrtc import compile_ptx
from ptx_machine.places import HEADERS, HERE

SEEDS = (0, 1, 2)
DEVICE = ["warp_operations", "round_trip<bf16>", "tile_product", "indices"]


def device(kernel, grid, block, *args, shared=0):
    ptx, lowered = compile_ptx(HERE / "device.cu", DEVICE, "sm_90a", include=HEADERS)
    return Module(ptx).launch(lowered[kernel], grid, block, args, shared)


def test_warp_operations_are_those_of_the_cuda_manual():
    x, y = np.random.default_rng(0).permutation(32).astype(np.int32), np.zeros((14, 32), np.int32)
    device("warp_operations", (1,), (32,), x, y)
    lane = np.arange(32)
    down = np.where(lane % 16 + 3 < 16, lane + 3, lane)
    signs = np.array([np.packbits((x % 4 == value % 4), bitorder="little").view(np.int32)[0] for value in x])
    expected = [
        np.full(32, x[5]), x[lane // 8 * 8 + (lane + 1) % 8], x[np.where(lane >= 3, lane - 3, lane)], x[np.minimum(down, 31)], x[lane ^ 21],
        np.full(32, np.packbits(x % 3 == 0, bitorder="little").view(np.int32)[0]), np.ones(32), np.ones(32), signs,
        [int(v).bit_count() for v in x], [32 - int(v).bit_length() for v in x], [(int(v) & -int(v)).bit_length() for v in x],
        np.full(32, 16), np.full(32, 2),
    ]  # fmt: skip
    for row, wanted in zip(y, expected, strict=True):
        assert np.array_equal(row, np.asarray(wanted))


def test_bfloat16_rounds_to_the_nearest_even():
    draw = np.random.default_rng(0)
    x = np.concatenate([draw.standard_normal(1018), [np.nan, np.inf, -np.inf, 0.0, 3.4e38, 1.00390625]]).astype(np.float32)
    y = np.zeros(1024, ml_dtypes.bfloat16)
    device("round_trip<bf16>", (4,), (256,), x, y)
    assert np.array_equal(y.astype(np.float32), x.astype(ml_dtypes.bfloat16).astype(np.float32), equal_nan=True)


def test_a_tile_through_ldmatrix_and_mma_is_the_product():
    draw = np.random.default_rng(0)
    a, b = draw.standard_normal((16, 16)).astype(ml_dtypes.bfloat16), draw.standard_normal((16, 8)).astype(ml_dtypes.bfloat16)
    c = np.zeros((16, 8), np.float32)
    counters = device("tile_product", (1,), (32,), a, b, c)
    assert np.allclose(c, a.astype(np.float32) @ b.astype(np.float32), atol=1e-5)
    assert counters["products"] == 1


def test_launches_have_three_axes():
    y = np.zeros((2 * 3 * 2, 8 * 4 * 2), np.int32)
    device("indices", (2, 3, 2), (8, 4, 2), y)
    assert np.array_equal(y, np.arange(12)[:, None] * 1000 + np.arange(64))


# ---- Numba-CUDA --------------------------------------------------------------------------------------------------------------------------

ALL = 0xFFFFFFFF


@cuda.jit(device=True)
def warp_sum(value):
    for offset in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(ALL, value, offset)
    return value


@cuda.jit
def numba_operations(x, y):
    lane = cuda.threadIdx.x
    value = x[lane]
    y[0, lane] = cuda.shfl_sync(ALL, value, 5)
    y[1, lane] = cuda.shfl_up_sync(ALL, value, 3)
    y[2, lane] = cuda.shfl_down_sync(ALL, value, 3)
    y[3, lane] = cuda.shfl_xor_sync(ALL, value, 21)
    y[4, lane] = cuda.ballot_sync(ALL, value % 3 == 0)
    y[5, lane] = cuda.any_sync(ALL, value == 7)
    y[6, lane] = cuda.all_sync(ALL, value >= 0)
    y[7, lane] = warp_sum(value)
    y[8, lane] = cuda.popc(value)
    y[9, lane] = cuda.syncthreads_count(value % 2)
    y[10, lane] = int32(math.exp(math.log(float32(value + 1))) * float32(1.5) + float32(0.25))


@cuda.jit
def sums_and_largest(x, y, largest):
    tile = cuda.shared.array(256, float32)
    t = cuda.threadIdx.x
    tile[t] = x[cuda.blockIdx.x * 256 + t]
    cuda.syncthreads()
    half = 128
    while half:
        if t < half:
            tile[t] += tile[t + half]
        cuda.syncthreads()
        half //= 2
    if t == 0:
        cuda.atomic.add(y, 0, tile[0])
    cuda.atomic.max(largest, 0, int32(x[cuda.blockIdx.x * 256 + t] * float32(1000.0)))


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_share_an_atomic_and_a_tree_of_sums(seed):
    x, y, largest = np.random.default_rng(0).random(16 * 256).astype(np.float32), np.zeros(1, np.float32), np.zeros(1, np.int32)
    NumbaOnPtx(seed)(sums_and_largest)[16, 256](x, y, largest)
    assert y[0] == pytest.approx(x.sum(dtype=np.float64), rel=1e-5) and largest[0] == int(x.max() * np.float32(1000))


def test_warp_operations_of_numba_are_those_of_the_cuda_manual():
    x, y = np.random.default_rng(0).permutation(32).astype(np.int32), np.zeros((11, 32), np.int32)
    NumbaOnPtx()(numba_operations)[1, 32](x, y)
    lane = np.arange(32)
    expected = [
        np.full(32, x[5]), x[np.where(lane >= 3, lane - 3, lane)], x[np.where(lane + 3 < 32, lane + 3, lane)], x[lane ^ 21],
        np.full(32, np.packbits(x % 3 == 0, bitorder="little").view(np.int32)[0]), np.ones(32), np.ones(32), np.full(32, x.sum()),
        [int(v).bit_count() for v in x], np.full(32, 16), (x + 1) * 3 // 2,
    ]  # fmt: skip
    for row, wanted in zip(y, expected, strict=True):
        assert np.array_equal(row, np.asarray(wanted))


# ---- what is refused ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid, block, shared, words",
    [
        (1, 2048, 0, "2048 threads in a block: a card takes 1 to 1024"),
        (0, 32, 0, "0 blocks along axis 0"),
        (1, 32, 300_000, "300000 bytes of shared memory: a card has 232448"),
    ],
)
def test_a_launch_that_no_device_takes_is_refused(grid, block, shared, words):
    with pytest.raises(Fault, match=words):
        device("indices", (grid,), (block,), np.zeros(block, np.int32), shared=shared)


@pytest.mark.parametrize("argument", [3, np.zeros((4, 4), np.int32)[:, ::2], [1.0]])
def test_arguments_that_are_no_arrays_or_exact_scalars_are_refused(argument):
    with pytest.raises(TypeError, match="a kernel takes C-contiguous arrays"):
        device("indices", (1,), (32,), argument)


def test_a_wrong_number_of_arguments_is_refused():
    with pytest.raises(Fault, match="it takes 1 arguments, not 2"):
        device("indices", (1,), (32,), np.zeros(32, np.int32), np.int32(1))


def test_what_the_compiler_refuses_is_shown(tmp_path):
    (tmp_path / "wrong.cu").write_text("__global__ void wrong(float* y) { y[0] = nothing; }\n")
    with pytest.raises(RuntimeError, match=r"wrong.cu\(1\).*nothing"):
        compile_ptx(tmp_path / "wrong.cu", ["wrong"], "sm_90a")


def test_ptx_that_the_machine_does_not_know_is_refused_with_its_line():
    with pytest.raises(Fault, match=r"PTX line 3: frobnicate.f32 %f1"):
        Module(".version 8.0\n.entry k() {\nfrobnicate.f32 %f1, 0f00000000;\n}\n")


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"g\+\+ is needed"):
        build.library()
