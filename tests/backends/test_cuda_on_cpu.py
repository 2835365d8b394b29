"""The harness that runs CUDA C on the processor: it does what a device does, and it catches what it is there to catch."""

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cuda_on_cpu.cpu_cuda import ORDERS, CudaOnCpu
from fresh_process import first_words

HERE = Path(__file__).parents[1] / "cuda_on_cpu"
BUGS = [
    "reverse_block", "missing_barrier", "barrier_in_a_branch", "half_a_warp", "different_operations", "row_too_far", "row_before",
    "read_too_far", "uninitialised", "uninitialised_dynamic<0>", "read_far_away", "undefined_shift",
]  # fmt: skip
DEVICE = ["warp_operations", "round_trip<__nv_bfloat16>", "tile_product", "indices"]


def run(kernel, order="forward", options=()):
    """A kernel of bugs.cu on 1 .. 64."""
    x, y = np.arange(1, 65, dtype=np.float32), np.zeros(64, np.float32)
    CudaOnCpu(HERE / "bugs.cu", BUGS, order, options).kernel(kernel)((1,), (64,), (x, y), shared_mem=256)
    return y


# ---- planted bugs ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("options", [(), ("-DCUDA_ON_CPU_UCONTEXT",)], ids=["own switch", "ucontext"])
def test_a_kernel_without_a_bug_runs_in_every_order(order, options):
    assert np.array_equal(run("reverse_block", order, options), np.arange(64, 0, -1))


def test_a_missing_barrier_shows_as_results_that_differ_with_the_order():
    assert len({run("missing_barrier", order).tobytes() for order in ORDERS}) > 1


@pytest.mark.parametrize(
    "kernel, words",
    [
        ("barrier_in_a_branch", r"block \(0,0,0\): thread 0 waits at __syncthreads \(line \d+\), thread 32 is at the end"),
        ("half_a_warp", "a warp operation without all 32 lanes"),
        ("different_operations", "waits at a warp operation"),
        ("row_too_far", r"row_too_far: argument 1, float32\[64\]: the kernel wrote behind its memory"),
        ("row_before", r"row_before: argument 1, float32\[64\]: the kernel wrote before its memory"),
    ],
)
def test_what_a_device_may_leave_unsaid_is_an_error_with_its_place(kernel, words):
    with pytest.raises(RuntimeError, match=words):
        run(kernel)


@pytest.mark.parametrize("kernel, place", [("read_too_far", 63), ("uninitialised", 0), ("uninitialised_dynamic<0>", 0)])
def test_what_was_never_written_reads_as_nan(kernel, place):
    y = run(kernel)
    assert np.isnan(y[place]) and np.isnan(y).sum() == 1


SANITIZED = """
import sys
import numpy as np
from cuda_on_cpu import cpu_cuda
from cuda_on_cpu.cpu_cuda import CudaOnCpu
from backends.test_cuda_on_cpu import BUGS, HERE
cpu_cuda.MARGIN = 16  # the sanitizer has margins of its own
options = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
module = CudaOnCpu(HERE / "bugs.cu", BUGS, options=options)
module.kernel(sys.argv[1])((1,), (64,), (np.arange(64, dtype=np.float32), np.zeros(64, np.float32)), shared_mem=256)
"""


def sanitized(kernel):
    """A kernel of bugs.cu under g++'s address and undefined-behaviour sanitizers, in a process of its own. -> its errors"""
    asan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    env = {**os.environ, "LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": f"{HERE.parent}"}
    done = subprocess.run([sys.executable, "-c", SANITIZED, kernel], capture_output=True, text=True, env=env, timeout=120)
    return done.stderr


def test_a_kernel_passes_the_sanitizers_and_one_far_outside_does_not():
    assert sanitized("reverse_block") == ""
    assert "AddressSanitizer: heap-buffer-overflow" in sanitized("read_far_away")
    assert "runtime error: shift exponent 32" in sanitized("undefined_shift")


SIDE_BY_SIDE = """
import numpy as np
from cuda_on_cpu import numba_cpu
from cuda_on_cpu.cpu_cuda import CudaOnCpu
from backends.test_cuda_on_cpu import DEVICE, HERE
numba_cpu.library()  # its symbols are global: whatever is loaded later would find them first
module = CudaOnCpu(HERE / "device.cu", DEVICE)
y = np.zeros((12, 64), np.int32)
module.kernel("indices")((2, 3, 2), (8, 4, 2), (y,))
assert np.array_equal(y, np.arange(12)[:, None] * 1000 + np.arange(64))
x, y = np.arange(32, dtype=np.int32), np.zeros((14, 32), np.int32)
module.kernel("warp_operations")((1,), (32,), (x, y))
assert (y[0] == 5).all()
"""


def test_kernels_run_beside_the_runtime_of_numba_kernels_that_was_loaded_first():
    first_words(code=SIDE_BY_SIDE)


# ---- as a device does it -----------------------------------------------------------------------------------------------------------------


def device(kernel, grid, block, *args):
    CudaOnCpu(HERE / "device.cu", DEVICE).kernel(kernel)(grid, block, args)


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
    device("round_trip<__nv_bfloat16>", (4,), (256,), x, y)
    assert np.array_equal(y.astype(np.float32), x.astype(ml_dtypes.bfloat16).astype(np.float32), equal_nan=True)


def test_a_tile_through_ldmatrix_and_mma_is_the_product():
    draw = np.random.default_rng(0)
    a, b = draw.standard_normal((16, 16)).astype(ml_dtypes.bfloat16), draw.standard_normal((16, 8)).astype(ml_dtypes.bfloat16)
    c = np.zeros((16, 8), np.float32)
    device("tile_product", (1,), (32,), a, b, c)
    assert np.allclose(c, a.astype(np.float32) @ b.astype(np.float32), atol=1e-5)


def test_launches_have_three_axes():
    y = np.zeros((2 * 3 * 2, 8 * 4 * 2), np.int32)
    device("indices", (2, 3, 2), (8, 4, 2), y)
    assert np.array_equal(y, np.arange(12)[:, None] * 1000 + np.arange(64))


@pytest.mark.parametrize("block, shared", [(33, 0), (2048, 0), (32, 300_000)])
def test_a_launch_that_no_device_takes_is_refused(block, shared):
    kernel = CudaOnCpu(HERE / "device.cu", DEVICE).kernel("indices")
    with pytest.raises(RuntimeError, match="want whole warps, at most 1024"):
        kernel((1,), (block,), (np.zeros(block, np.int32),), shared_mem=shared)


@pytest.mark.parametrize("argument", [3, np.zeros((4, 4), np.int32)[:, ::2], [1.0]])
def test_arguments_that_are_no_arrays_or_exact_scalars_are_refused(argument):
    with pytest.raises(TypeError, match="a kernel takes C-contiguous arrays"):
        device("indices", (1,), (32,), argument)


def test_what_the_compiler_refuses_is_shown(tmp_path):
    (tmp_path / "wrong.cu").write_text("__global__ void wrong(float* y) { y[0] = nothing; }\n")
    with pytest.raises(RuntimeError, match=r"wrong.cu:1:.*nothing"):
        CudaOnCpu(tmp_path / "wrong.cu", ["wrong"])


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"g\+\+ is needed"):
        CudaOnCpu(HERE / "device.cu", DEVICE)
