"""What kernels share on the device: float32 constants, sums over a warp or a block, the order in which values are chosen.

A Python number in a kernel is float64, and so is any operation with it: hence the float32 constants.
"""

import math

import numpy as np

from minimoe_numba_cuda.compiler import cuda, float32, int64, libdevice

LANES = 32  # threads of a warp
WARPS = 4  # warps per block, if each has its own row
ALL = 0xFFFFFFFF  # the mask of a warp operation: every lane takes part
ROW_LANES = 8  # rows of threads in a block that sums columns

ZERO, HALF, ONE, THREE = (np.float32(value) for value in (0.0, 0.5, 1.0, 3.0))
INFINITY, NAN = np.float32(math.inf), np.float32(math.nan)
SIGMOID_FLOOR = np.float32(-80.0)  # below, exp(-x) would overflow

NOTHING, EVERYTHING = np.int64(-(2**63)), np.int64(2**63 - 1)  # below and above every key of `sort_key`
LARGEST_INDEX = 0x7FFFFFFF


@cuda.jit(device=True, forceinline=True)
def warp_sum(value):  # type: ignore[no-untyped-def]
    """The sum over the warp, the same bits in every lane: five additions of the value of the lane at distance 16, 8, 4, 2, 1."""
    for distance in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(ALL, value, distance)
    return value


@cuda.jit(device=True, forceinline=True)
def warp_max(value):  # type: ignore[no-untyped-def]
    """The maximum over the warp, in every lane."""
    for distance in (16, 8, 4, 2, 1):
        value = max(value, cuda.shfl_xor_sync(ALL, value, distance))
    return value


@cuda.jit(device=True, forceinline=True)
def sum_over_block_rows(value):  # type: ignore[no-untyped-def]
    """The sum over threadIdx.y, in its order, for the threads of row 0; zero elsewhere. Block: (LANES, ROW_LANES), all of it."""
    tile = cuda.shared.array((ROW_LANES, LANES), float32)
    tile[cuda.threadIdx.y, cuda.threadIdx.x] = value
    cuda.syncthreads()
    total = ZERO
    if cuda.threadIdx.y == 0:
        for row in range(ROW_LANES):
            total += tile[row, cuda.threadIdx.x]
    cuda.syncthreads()
    return total


@cuda.jit(device=True, forceinline=True)
def sum_over_block(value):  # type: ignore[no-untyped-def]
    """The sum over a block of 32 * WARPS threads, in every thread: each warp's, then those in order."""
    sums = cuda.shared.array(WARPS, float32)
    value = warp_sum(value)
    if cuda.threadIdx.x % LANES == 0:
        sums[cuda.threadIdx.x // LANES] = value
    cuda.syncthreads()
    total = ZERO
    for warp in range(WARPS):
        total += sums[warp]
    cuda.syncthreads()
    return total


@cuda.jit(device=True, forceinline=True)
def max_over_block(value):  # type: ignore[no-untyped-def]
    """The maximum over a block of 32 * WARPS threads, in every thread."""
    tops = cuda.shared.array(WARPS, float32)
    value = warp_max(value)
    if cuda.threadIdx.x % LANES == 0:
        tops[cuda.threadIdx.x // LANES] = value
    cuda.syncthreads()
    top = tops[0]
    for warp in range(1, WARPS):
        top = max(top, tops[warp])
    cuda.syncthreads()
    return top


@cuda.jit(device=True, forceinline=True)
def sigmoid(x):  # type: ignore[no-untyped-def]
    if x < SIGMOID_FLOOR:
        x = SIGMOID_FLOOR
    return ONE / (ONE + math.exp(-x))


@cuda.jit(device=True, forceinline=True)
def sort_key(value, index):  # type: ignore[no-untyped-def]
    """Returns an integer that is larger the earlier a value is chosen: large values first, then low indices, NaN last.

    The bits of a float grow with it, except for negative ones, whose bits are inverted; -0 + 0 is 0. So the choice of the best is one
    maximum over integers, the index breaks ties, and "not chosen yet" means "below the last key".
    """
    bits = libdevice.float_as_int(value + ZERO)
    if bits < 0:
        bits = bits ^ 0x7FFFFFFF
    if value != value:
        bits = -0x80000000
    return (int64(bits) << 32) | (LARGEST_INDEX - index)


@cuda.jit(device=True, forceinline=True)
def key_index(key):  # type: ignore[no-untyped-def]
    """Returns the index that a key was made from."""
    return LARGEST_INDEX - (key & LARGEST_INDEX)
