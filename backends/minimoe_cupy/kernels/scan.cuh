// Prefix sums of integers, one per thread, for counting sorts and compactions.
#pragma once
#include "common.cuh"

// The sum of the values of this lane and all below it.
__device__ inline int warp_inclusive(int value) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        const int below = __shfl_up_sync(ALL_LANES, value, offset);
        if (lane >= offset) value += below;
    }
    return value;
}

// The sum of the values of all threads before this one; `total`: of the whole block. `sums` [WARPS] is shared. All threads of the block.
template <int WARPS>
__device__ inline int block_exclusive(int value, int* sums, int& total) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int inclusive = warp_inclusive(value);
    if (lane == WARP - 1) sums[warp] = inclusive;
    __syncthreads();
    const int of_warps = warp_inclusive(lane < WARPS ? sums[lane] : 0);  // each warp adds up the sums of all
    total = __shfl_sync(ALL_LANES, of_warps, WARPS - 1);
    const int upto = __shfl_sync(ALL_LANES, of_warps, warp), mine = __shfl_sync(ALL_LANES, inclusive, WARP - 1);
    __syncthreads();  // `sums` may be used again
    return upto - mine + inclusive - value;
}
