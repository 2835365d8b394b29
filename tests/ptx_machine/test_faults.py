"""The machine finds planted faults, in CUDA C and in Numba-CUDA, names their places, and passes the same kernels without them."""

import numpy as np
import pytest
from numba import cuda
from numba.cuda import float32

from ptx_machine.machine import Fault, Module, unwritten
from ptx_machine.numba_on_ptx import NumbaOnPtx
from ptx_machine.nvrtc import compile_ptx
from ptx_machine.places import HERE

SEEDS = (0, 1, 2)
BUGS = [
    "reverse_block", "missing_barrier", "barrier_in_a_branch", "half_a_warp", "mask_of_all", "lane_outside_its_mask", "different_operations",
    "row_too_far", "row_before", "read_too_far", "read_far_away", "undefined_shift", "uninitialised", "uninitialised_dynamic<0>",
    "uninitialised_global", "misaligned", "blocks_race", "lanes_race", "loop_without_end", "division_by_zero",
]  # fmt: skip


def run(kernel, seed=0, blocks=1):
    """A kernel of bugs.cu on 1 .. 64."""
    ptx, lowered = compile_ptx(HERE / "bugs.cu", BUGS, "sm_90a")
    x, y = np.arange(1, 65, dtype=np.float32), unwritten(64, np.float32)
    Module(ptx).launch(lowered[kernel], (blocks,), (64,), (x, y), 256, seed, title=kernel, names=["x", "y"], most_instructions=1 << 20)
    return y


@pytest.mark.parametrize("seed", SEEDS)
def test_a_kernel_without_a_fault_runs_in_every_schedule(seed):
    assert np.array_equal(run("reverse_block", seed), np.arange(64, 0, -1))


FOUND = {
    "missing_barrier": "races with|nobody wrote",
    "barrier_in_a_branch": r"thread 0: it waits at a barrier, and thread 32 has ended",
    "half_a_warp": r"thread 0: it waits at a barrier, and thread 16 of its warp has ended",
    "mask_of_all": r"waits at a warp operation, and thread \d+ of its warp|the member mask ffffffff names thread 16, which has ended",
    "lane_outside_its_mask": "a lane that is not in its own member mask, 0000ffff",
    "different_operations": r"waits at a warp operation, and thread 1 of its warp waits at PTX line \d+ \(bugs.cu:\d+\)",
    "row_too_far": r"write.* y, float32\[64\]",
    "row_before": r"write.* y, float32\[64\]",
    "read_too_far": r"read.* x, float32\[64\]",
    "read_far_away": r"read.* x, float32\[64\]",
    "undefined_shift": "a shift by 32",
    "uninitialised": "nobody wrote",
    "uninitialised_dynamic<0>": "nobody wrote",
    "uninitialised_global": "nobody wrote|races with",
    "misaligned": "align",
    "lanes_race": "races with",
    "loop_without_end": "the kernel does not end",
    "division_by_zero": "undefined: it comes from a division by zero",
}


@pytest.mark.parametrize("kernel", FOUND)
@pytest.mark.parametrize("seed", SEEDS[:2])
def test_a_fault_is_found_and_named_with_its_place(kernel, seed):
    with pytest.raises(Fault, match=FOUND[kernel]) as raised:
        run(kernel, seed)
    message = str(raised.value)
    line = next(i for i, text in enumerate((HERE / "bugs.cu").read_text().splitlines(), 1) if f"void {kernel.partition('<')[0]}(" in text)
    assert message.startswith(kernel) and message.endswith(f"(seed {seed})") and "\n" not in message
    places = [int(part.partition(")")[0].partition(",")[0]) for part in message.split("bugs.cu:")[1:]]
    assert any(line <= place <= line + 8 for place in places), message


def test_blocks_that_write_the_same_place_race():
    with pytest.raises(Fault, match=r"races with.*block"):
        run("blocks_race", blocks=2)
    assert run("blocks_race").tolist() == list(range(1, 65))


# ---- Numba-CUDA --------------------------------------------------------------------------------------------------------------------------


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
        y[t] = cuda.shfl_xor_sync(0xFFFFFFFF, x[t], 1)


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


def run_numba(kernel, seed=0):
    x, y = np.arange(1, 65, dtype=np.float32), unwritten(64, np.float32)
    NumbaOnPtx(seed)(kernel)[1, 64, 0, 256](x, y)
    return y


@pytest.mark.parametrize("seed", SEEDS)
def test_a_numba_kernel_without_a_fault_runs_in_every_schedule(seed):
    assert np.array_equal(run_numba(reverse_block, seed), np.arange(64, 0, -1))


FOUND_IN_NUMBA = {
    missing_barrier: "missing_barrier: .*(races with|nobody wrote)",
    barrier_in_a_branch: r"thread 0: it waits at a barrier, and thread 32 has ended",
    half_a_warp: "half_a_warp: .*waits at a warp operation|names thread 16",
    row_too_far: r"row_too_far: .*write.* y, float32\[64\]",
    read_too_far: r"read_too_far: .*read.* x, float32\[64\]",
    uninitialised: "nobody wrote",
    uninitialised_dynamic: "nobody wrote",
}


@pytest.mark.parametrize("kernel", FOUND_IN_NUMBA, ids=lambda kernel: kernel.py_func.__name__)
def test_a_fault_of_a_numba_kernel_is_found_and_named_with_its_place(kernel):
    with pytest.raises(Fault, match=FOUND_IN_NUMBA[kernel]) as raised:
        run_numba(kernel)
    assert "test_faults.py:" in str(raised.value)
