// grouped_bias: y[r] = bias[e] for the expert e that owns row r, zero for unused rows.                    bias [E,O], offsets [E+1] -> [R,O]
// One warp per row; each lane stores V elements (16 bytes where O allows). The expert is found by bisection. Its gradient is summed below.
// Bytes: R * O * sizeof(T).   Grid: ceil(R / WARPS), block 32 * WARPS.
// Reference: minimoe/reference/expert.py.   Unproven: no card has run it.
#include "common.cuh"

constexpr int WARPS = 8, SUM_WARPS = 16;

template <class T, int V>
__global__ void grouped_bias(const T* bias, const int* offsets, T* y, int rows, int n_experts, int width) {
    const int row = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (row >= rows) return;
    int low = 0, high = n_experts + 1;  // the last expert whose rows begin at or before this one; E: unused
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (offsets[middle] <= row) low = middle;
        else high = middle;
    }
    for (int column = threadIdx.x % WARP * V; column < width; column += WARP * V) {
        float values[V] = {};
        if (low < n_experts) load(bias + (long long)low * width + column, values);
        store(y + (long long)row * width + column, values);
    }
}

// grouped_bias_backward: db[e] = sum of dy[r] over the rows r of e, in float32, or added to it.                dy [R,O], offsets [E+1] -> [E,O]
// A block takes 32 V columns of one expert; its warps take every SUM_WARPS-th row, and and their sums are added in the order of the warps.
// Bytes: R * O * sizeof(T).   Grid: (ceil(O / 32 V), E), block 32 * SUM_WARPS.
template <class T, int V>
__global__ void grouped_bias_backward(const T* dy, const int* offsets, float* db, int width, bool accumulate) {
    __shared__ float sums[SUM_WARPS][WARP][V];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, expert = blockIdx.y;
    const int column = (blockIdx.x * WARP + lane) * V, last = offsets[expert + 1];
    float sum[V] = {};
    if (column < width) {
#pragma unroll 4
        for (int row = offsets[expert] + warp; row < last; row += SUM_WARPS) {
            float values[V];
            load(dy + (long long)row * width + column, values);
#pragma unroll
            for (int i = 0; i < V; i++) sum[i] += values[i];
        }
    }
#pragma unroll
    for (int i = 0; i < V; i++) sums[warp][lane][i] = sum[i];
    __syncthreads();
    if (warp || column >= width) return;
    float* to = db + (long long)expert * width + column;
    for (int w = 1; w < SUM_WARPS; w++) {
#pragma unroll
        for (int i = 0; i < V; i++) sum[i] += sums[w][lane][i];
    }
    if (accumulate) {
        float old[V];
        load_sums(to, old);
#pragma unroll
        for (int i = 0; i < V; i++) sum[i] += old[i];
    }
    store_sums(to, sum);
}
