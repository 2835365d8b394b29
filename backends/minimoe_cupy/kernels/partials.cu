// add_partials: adds up what the blocks of gate and noisy_load have each summed: probabilities (or loads) and counts.
//   float_parts [parts,E], int_parts [parts,E] or null -> floats [E], ints [E]
// One block per EXPERTS columns, 32 bytes per row, with 32 threads for each column: a thread adds rows r, r + 32, ..., then the threads are
// added as a fixed tree. The launch shape fixes the order of every sum, so equal inputs give equal bits.
// Bytes: 8 parts E.   Grid: ceil(E / EXPERTS), block 32 * EXPERTS.
// Reference: the sums in minimoe/reference/gating.py and routing.py.   Unproven: no card has run it.
#include "common.cuh"

constexpr int WARPS = 8;
constexpr int EXPERTS = 8;

__global__ void add_partials(const float* float_parts, const int* int_parts, float* floats, int* ints, int parts, int n_experts) {
    __shared__ float sums[WARPS][EXPERTS];
    __shared__ int counts[WARPS][EXPERTS];
    const int column = threadIdx.x % EXPERTS, e = blockIdx.x * EXPERTS + column, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float sum = 0.0f;
    int count = 0;
    if (e < n_experts) {
#pragma unroll 4
        for (int part = threadIdx.x / EXPERTS; part < parts; part += WARP) {
            sum += float_parts[(long long)part * n_experts + e];
            if (ints) count += int_parts[(long long)part * n_experts + e];
        }
    }
#pragma unroll
    for (int offset = EXPERTS; offset < WARP; offset *= 2) {
        sum += __shfl_xor_sync(ALL_LANES, sum, offset);
        count += __shfl_xor_sync(ALL_LANES, count, offset);
    }
    if (lane < EXPERTS) {
        sums[warp][column] = sum;
        counts[warp][column] = count;
    }
    __syncthreads();
    if (threadIdx.x >= EXPERTS || e >= n_experts) return;
    for (int w = 1; w < WARPS; w++) {
        sum += sums[w][column];
        count += counts[w][column];
    }
    floats[e] = sum;
    if (ints) ints[e] = count;
}
