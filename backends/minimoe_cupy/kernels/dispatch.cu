// dispatch: rows[inverse[n,j]] = x[n] for every slot that has a row                            [R,D] <- [N,D], inverse [N,W]
// One warp per token, which is read once however many experts take it; each lane loads V elements (16 bytes where D allows). Nothing is summed.
// Rows that no expert owns are not written.
// Bytes: (N + used slots) * D * sizeof(T), and 4 N W.   Grid: ceil(N / WARPS), block 32 * WARPS.
// Reference: minimoe/reference/routing.py.   Unproven: no card has run it.
#include "common.cuh"

constexpr int WARPS = 8;

template <class T, int V>
__global__ void dispatch(const T* x, const int* inverse, T* rows, int n_tokens, int width, int d_model) {
    const long long token = (long long)blockIdx.x * WARPS + threadIdx.x / WARP;
    if (token >= n_tokens) return;
    for (int d = threadIdx.x % WARP * V; d < d_model; d += WARP * V) {
        float values[V];
        load(x + token * d_model + d, values);
        for (int j = 0; j < width; j++) {
            const int row = inverse[token * width + j];
            if (row >= 0) store(rows + (long long)row * d_model + d, values);
        }
    }
}
