// embedding: y[n] = weight[ids[n]]                                                                          [N,D] <- [V,D], [N]
// One warp per token; each lane loads V elements (16 bytes where D allows). An id that names no row gives NaN, and reads
// nothing. Nothing is summed.
// Bytes: 2 * N * D * sizeof(T), and 4 N.   Grid: ceil(N / WARPS), block 32 * WARPS.
// Reference: minimoe/reference/embedding.py.   Unproven: no card has run it.
#include "common.cuh"
#include "row_of.cuh"

constexpr int WARPS = 8;

template <class T, int V>
__global__ void embedding(const T* weight, const int* ids, T* y, int n_tokens, int rows, int width) {
    const long long token = (long long)blockIdx.x * WARPS + threadIdx.x / WARP;
    if (token >= n_tokens) return;
    const int row = row_of(ids[token], rows);
    for (int d = threadIdx.x % WARP * V; d < width; d += WARP * V) {
        float values[V];
#pragma unroll
        for (int i = 0; i < V; i++) values[i] = nan();
        if (row < rows) load(weight + (long long)row * width + d, values);
        store(y + token * width + d, values);
    }
}
