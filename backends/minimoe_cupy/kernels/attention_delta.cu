// What attention's backward pass needs of each row, and the gradient of the sinks.
//
// attention_delta: delta[b,h,t] = sum(dy[b,t,h] * y[b,t,h])                               [B,Q,Tq] <- [B,Tq,Q,Cv], [B,Tq,Q,Cv]
//   Eight lanes per row; each sums its accesses in order, then the lanes are summed as a tree.
//   Bytes: 2 B Tq Q Cv sizeof(T) read.   Grid: ceil(B Tq Q / ROWS); 256 threads.
// attention_dsinks: dsinks[h] = -sum over b, t of exp(sinks[h] - logsumexp[b,h,t]) delta[b,h,t]                  [Q] <- [Q], [B,Q,Tq], [B,Q,Tq]
//   One block per head; each thread sums its stride in order, then the threads are summed as a tree.   Bytes: 8 B Q Tq.   Grid: Q; 256 threads.
// Reference: minimoe/reference/attention.py.   Unproven: no card has run it.
#include "common.cuh"

constexpr int BLOCK = 256, LANES = 8, ROWS = BLOCK / LANES, WARPS = BLOCK / WARP;

template <int V, class T>
__global__ void __launch_bounds__(256) attention_delta(const T* dy, const T* y, float* delta, int n_q, int queries, int width, long long n_rows) {
    const long long row = (long long)blockIdx.x * ROWS + threadIdx.x / LANES;
    float sum = 0.0f;
    if (row < n_rows) {
        for (int c = threadIdx.x % LANES * V; c < width; c += LANES * V) {
            float a[V], b[V];
            load(dy + row * width + c, a);
            load(y + row * width + c, b);
#pragma unroll
            for (int i = 0; i < V; i++) sum = fmaf(a[i], b[i], sum);
        }
    }
#pragma unroll
    for (int offset = LANES / 2; offset; offset /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
    if (row >= n_rows || threadIdx.x % LANES) return;
    const long long token = row / queries, b = token / n_q;
    delta[(b * queries + row - token * queries) * n_q + token - b * n_q] = sum;
}

__global__ void __launch_bounds__(256) attention_dsinks(
    const float* sinks, const float* logsumexp, const float* delta, float* dsinks, int n_batch, int n_q
) {
    __shared__ float sums[WARPS];
    const int head = blockIdx.x, queries = gridDim.x;
    const float sink = sinks[head];
    float sum = 0.0f;
    for (long long i = threadIdx.x; i < (long long)n_batch * n_q; i += BLOCK) {
        const long long b = i / n_q, at = (b * queries + head) * n_q + i - b * n_q;
        const float lse = logsumexp[at];
        if (lse != -infinity()) sum = fmaf(__expf(sink - lse), delta[at], sum);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x >= WARP) return;
    sum = warp_sum(threadIdx.x < WARPS ? sums[threadIdx.x] : 0.0f);
    if (threadIdx.x == 0) dsinks[head] = -sum;
}
