// combine: y[n] = sum over j of weights[n,j] * rows[inverse[n,j]]           [N,D] <- [R,D], [N,W], [N,W]
// The backward of dispatch is the same kernel with weights of one (weights == nullptr).
// One warp per token; each lane loads V elements (16 bytes where D allows). Slots are summed in order, so equal inputs give equal bits.
// An inverse of -1 (dropped, padding) adds nothing, and no row is read for it.
// Bytes: (used slots + N) * D * sizeof(T), and 8 N W.   Grid: ceil(N / WARPS), block 32 * WARPS.
// Reference: minimoe/reference/routing.py.   Unproven: no card has run it.
#include "common.cuh"

constexpr int WARPS = 8;

template <class T, int V>
__global__ void combine(const T* rows, const float* weights, const int* inverse, T* y, int n_tokens, int width, int d_model) {
    const long long token = (long long)blockIdx.x * WARPS + threadIdx.x / WARP;
    if (token >= n_tokens) return;
    for (int d = threadIdx.x % WARP * V; d < d_model; d += WARP * V) {
        float sum[V] = {};
        for (int j = 0; j < width; j++) {
            const int row = inverse[token * width + j];
            if (row < 0) continue;
            const float weight = weights ? weights[token * width + j] : 1.0f;
            float part[V];
            load(rows + (long long)row * d_model + d, part);
#pragma unroll
            for (int i = 0; i < V; i++) sum[i] += weight * part[i];
        }
        store(y + token * d_model + d, sum);
    }
}

// combine_backward: drows[inverse[n,j]] = weights[n,j] * dy[n],   dweights[n,j] = <rows[inverse[n,j]], dy[n]>, 0 for slots without a row.
// One warp per token: dy[n] is read once from memory and then from L1. Rows at or past offsets[E] are not written.
// Bytes: (2 * used slots + N) * D * sizeof(T), and 12 N W.
template <class T, int V>
__global__ void combine_backward(
    const T* dy, const T* rows, const float* weights, const int* inverse, T* drows, float* dweights, int n_tokens, int width, int d_model
) {
    const long long token = (long long)blockIdx.x * WARPS + threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    if (token >= n_tokens) return;  // the same for all lanes of a warp
    for (int j = 0; j < width; j++) {
        const long long slot = token * width + j;
        const int row = inverse[slot];
        float inner = 0.0f;
        if (row >= 0) {
            const float weight = weights[slot];
            for (int d = lane * V; d < d_model; d += WARP * V) {
                float gradient[V], value[V], scaled[V];
                load(dy + token * d_model + d, gradient);
                load(rows + (long long)row * d_model + d, value);
#pragma unroll
                for (int i = 0; i < V; i++) {
                    inner += gradient[i] * value[i];
                    scaled[i] = weight * gradient[i];
                }
                store(drows + (long long)row * d_model + d, scaled);
            }
        }
        inner = warp_sum(inner);
        if (lane == 0) dweights[slot] = inner;
    }
}
