"""The harness that runs Numba-CUDA kernels on the processor: it does what a device does, and it catches what it is there to catch."""

import math

import numpy as np
import pytest
from cuda_on_cpu.cpu_cuda import ORDERS
from cuda_on_cpu.numba_cpu import NumbaOnCpu
from numba import cuda
from numba.cuda import float32, int32

ALL = 0xFFFFFFFF


@cuda.jit
def reverse_block(x, y):
    tile = cuda.shared.array(64, float32)
    t = cuda.threadIdx.x
    tile[t] = x[t]
    cuda.syncthreads()
    y[t] = tile[63 - t]


@cuda.jit
def missing_barrier(x, y):
    tile = cuda.shared.array(64, float32)
    t = cuda.threadIdx.x
    tile[t] = x[t]
    y[t] = tile[63 - t]


@cuda.jit
def barrier_in_a_branch(x, y):
    t = cuda.threadIdx.x
    if t < 32:
        cuda.syncthreads()
    y[t] = x[t]


@cuda.jit
def half_a_warp(x, y):
    t = cuda.threadIdx.x
    if t < 16:
        y[t] = cuda.shfl_xor_sync(0xFFFF, x[t], 1)


@cuda.jit
def row_too_far(x, y):
    t = cuda.threadIdx.x
    y[t + 1] = x[t]


@cuda.jit
def read_too_far(x, y):
    t = cuda.threadIdx.x
    y[t] = x[t + 1]


@cuda.jit
def uninitialised(x, y):
    tile = cuda.shared.array(64, float32)
    t = cuda.threadIdx.x
    if t > 0:
        tile[t] = x[t]
    cuda.syncthreads()
    y[t] = tile[t]


@cuda.jit
def uninitialised_dynamic(x, y):
    tile = cuda.shared.array(0, float32)
    t = cuda.threadIdx.x
    if t > 0:
        tile[t] = x[t]
    cuda.syncthreads()
    y[t] = tile[t]


@cuda.jit
def sums_and_largest(x, y):
    """y[0] += sum(x), y[1] = max(y[1], x): a tree of additions in each block, then one atomic."""
    tile = cuda.shared.array(256, float32)
    t = cuda.threadIdx.x
    tile[t] = x[cuda.grid(1)]
    cuda.syncthreads()
    step = 128
    while step > 0:
        if t < step:
            tile[t] += tile[t + step]
        cuda.syncthreads()
        step //= 2
    cuda.atomic.max(y, 1, x[cuda.grid(1)])
    if t == 0:
        cuda.atomic.add(y, 0, tile[0])


@cuda.jit(device=True)
def warp_sum(value):
    for offset in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(ALL, value, offset)
    return value


@cuda.jit
def warp_operations(x, y):
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


def run(kernel, order="forward", dynamic=0):
    x, y = np.arange(1, 65, dtype=np.float32), np.zeros(64, np.float32)
    NumbaOnCpu(order)(kernel)[1, 64, 0, dynamic](x, y)
    return y


# ---- planted bugs ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_a_kernel_without_a_bug_runs_in_every_order(order):
    assert np.array_equal(run(reverse_block, order), np.arange(64, 0, -1))


def test_a_missing_barrier_shows_as_results_that_differ_with_the_order():
    assert len({run(missing_barrier, order).tobytes() for order in ORDERS}) > 1


@pytest.mark.parametrize(
    "kernel, words",
    [
        (barrier_in_a_branch, r"barrier_in_a_branch: block \(0,0,0\): thread 0 waits at __syncthreads .* thread 32 is at the end"),
        (half_a_warp, "half_a_warp: .* a warp operation without all 32 lanes"),
        (row_too_far, r"row_too_far: argument 1, float32\[64\]: the kernel wrote behind its memory"),
    ],
)
def test_what_a_device_may_leave_unsaid_is_an_error(kernel, words):
    with pytest.raises(RuntimeError, match=words):
        run(kernel)


@pytest.mark.parametrize("kernel, place", [(read_too_far, 63), (uninitialised, 0), (uninitialised_dynamic, 0)])
def test_what_was_never_written_reads_as_nan(kernel, place):
    y = run(kernel, dynamic=256)
    assert np.isnan(y[place]) and np.isnan(y).sum() == 1


# ---- as a device does it -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_share_an_atomic_and_a_tree_of_sums(order):
    x, y = np.random.default_rng(0).random(16 * 256).astype(np.float32), np.zeros(2, np.float32)
    NumbaOnCpu(order)(sums_and_largest)[16, 256](x, y)
    assert y[0] == pytest.approx(x.sum(dtype=np.float64), rel=1e-5) and y[1] == x.max()


def test_warp_operations_are_those_of_the_cuda_manual():
    x, y = np.random.default_rng(0).permutation(32).astype(np.int32), np.zeros((11, 32), np.int32)
    NumbaOnCpu()(warp_operations)[1, 32](x, y)
    lane = np.arange(32)
    expected = [
        np.full(32, x[5]), x[np.where(lane >= 3, lane - 3, lane)], x[np.where(lane + 3 < 32, lane + 3, lane)], x[lane ^ 21],
        np.full(32, np.packbits(x % 3 == 0, bitorder="little").view(np.int32)[0]), np.ones(32), np.ones(32), np.full(32, x.sum()),
        [int(v).bit_count() for v in x], np.full(32, 16), (x + 1) * 3 // 2,
    ]  # fmt: skip
    for row, wanted in zip(y, expected, strict=True):
        assert np.array_equal(row, np.asarray(wanted))
