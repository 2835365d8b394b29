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
    int before = 0;
    total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        if (w < warp) before += sums[w];
        total += sums[w];
    }
    __syncthreads();  // `sums` may be used again
    return before + inclusive - value;
}
