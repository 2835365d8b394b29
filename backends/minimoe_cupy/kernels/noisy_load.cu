// noisy_load: how often each expert would be chosen if only its noise were drawn again (Shazeer et al. 2017, appendix A).
//   clean z, noisy h, sigma [N,E], valid [N] or null -> ids [N,k+1] of the k+1 largest h, and each block's sums of the loads [blocks,E]
//   load_i = sum_n Phi((z_ni - t_ni) / sigma_ni),   t_ni = the (k+1)-th value of h if i is among the k largest, else the k-th
// One warp per token, with h in registers; the largest are found one after the other (select.cuh). The warps of a grid with a fixed cap stride
// over the tokens; each block sums in a fixed order, and partials.cu adds the blocks.   Bytes: 12 N E read, 4 N (k + 1) written.
// Block 32 * WARPS, grid at most ceil(N / WARPS), shared 4 E.   Reference: minimoe/reference/routing.py.   Unproven: no card has run it.
#include "gate.cuh"

constexpr float SQRT_HALF = 0.70710678118654752f, ONE_OVER_SQRT_TWO_PI = 0.39894228040143268f;
extern __shared__ unsigned char dynamic_shared[];

template <int PER_LANE, int V>
__global__ void __launch_bounds__(32 * 8) noisy_load(
    const float* clean, const float* noisy, const float* sigma, const bool* valid, int* ids, float* load_parts, int n_tokens, int n_experts,
    int k
) {
    float* sums = reinterpret_cast<float*>(dynamic_shared);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float total[PER_LANE] = {};
    for (long long token = (long long)blockIdx.x * WARPS + warp; token < n_tokens; token += (long long)gridDim.x * WARPS) {
        const long long row = token * n_experts;
        int keys[PER_LANE], top = 0;
        {
            float h[PER_LANE];
            load_row<V>(noisy + row, n_experts, 0.0f, h, lane);
            write_keys<V>(h, n_experts, keys, lane);
        }
        unsigned among = 0;  // bit j: is element j one of the k largest
        float kth = 0.0f;
        for (int slot = 0; slot <= k; slot++) {
            if (slot == k) {
                kth = value_of(top);
#pragma unroll
                for (int j = 0; j < PER_LANE; j++) among |= unsigned(keys[j] == TAKEN) << j;
            }
            const int column = take_best<V>(keys, top, lane);
            if (lane == 0) ids[token * (k + 1) + slot] = column;
        }
        const float next = value_of(top);
        if (valid && !valid[token]) continue;
#pragma unroll
        for (int j = 0; j < PER_LANE; j += V) {
            const int column = lane * V + column_of<V>(j);
            if (column >= n_experts) continue;
            float z[V], s[V];
            load(clean + row + column, z);
            load(sigma + row + column, s);
#pragma unroll
            for (int i = 0; i < V; i++) {
                const float u = (z[i] - (among >> (j + i) & 1u ? next : kth)) / s[i];
                total[j + i] += 0.5f * (1.0f + erff(u * SQRT_HALF));
            }
        }
    }
    add_over_warps<WARPS, V>(total, n_experts, sums);
    for (int e = threadIdx.x * V; e < n_experts; e += WARPS * WARP * V) {
        float part[V];
#pragma unroll
        for (int i = 0; i < V; i++) part[i] = sums[e + i];
        store(load_parts + (long long)blockIdx.x * n_experts + e, part);
    }
}

// The value at a column of a row; NaN if there is no such column.
__device__ inline float value_at(const float* row, int column, int n) { return column >= 0 && column < n ? row[column] : nan(); }

// noisy_load_backward: dload [E] -> dclean, dnoisy, dsigma [N,E].
//   With u as above, g = dload phi(u) / sigma:   dclean = g,   dsigma = -g u,   dnoisy = -(the sum of g over those whose t it was)
// Bytes: 8 N E read and 12 N E written, 4 N (k + 1).   Block 32 * WARPS, grid at most ceil(N / WARPS).
template <int PER_LANE, int V>
__global__ void __launch_bounds__(32 * 8) noisy_load_backward(
    const float* dload, const float* clean, const float* noisy, const float* sigma, const int* ids, const bool* valid, float* dclean,
    float* dnoisy, float* dsigma, int n_tokens, int n_experts, int k
) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (long long token = (long long)blockIdx.x * WARPS + warp; token < n_tokens; token += (long long)gridDim.x * WARPS) {
        const long long row = token * n_experts;
        const int* chosen = ids + token * (k + 1);
        const int kth_column = chosen[k - 1], next_column = chosen[k];
        const float kth = value_at(noisy + row, kth_column, n_experts), next = value_at(noisy + row, next_column, n_experts);
        unsigned among = 0;
        for (int slot = 0; slot < k; slot++) {
            const int here = chosen[slot] - lane * V;
#pragma unroll
            for (int j = 0; j < PER_LANE; j++) among |= unsigned(here == column_of<V>(j)) << j;
        }
        const bool counted = !valid || valid[token];
        float from_next = 0.0f, from_kth = 0.0f;
#pragma unroll
        for (int j = 0; j < PER_LANE; j += V) {
            const int column = lane * V + column_of<V>(j);
            if (column >= n_experts) continue;
            float d[V], z[V], s[V], g[V], gu[V];
            load(dload + column, d);
            load(clean + row + column, z);
            load(sigma + row + column, s);
#pragma unroll
            for (int i = 0; i < V; i++) {
                const bool inside = among >> (j + i) & 1u;
                const float u = (z[i] - (inside ? next : kth)) / s[i];
                g[i] = counted ? d[i] * expf(-0.5f * u * u) * ONE_OVER_SQRT_TWO_PI / s[i] : 0.0f;
                gu[i] = -g[i] * u;
                from_next += inside ? g[i] : 0.0f;
                from_kth += inside ? 0.0f : g[i];
            }
            store(dclean + row + column, g);
            store(dsigma + row + column, gu);
        }
        from_next = warp_sum(from_next);
        from_kth = warp_sum(from_kth);
#pragma unroll
        for (int j = 0; j < PER_LANE; j += V) {
            const int column = lane * V + column_of<V>(j);
            if (column >= n_experts) continue;
            float d[V];
#pragma unroll
            for (int i = 0; i < V; i++)
                d[i] = (column + i == kth_column ? -from_kth : 0.0f) + (column + i == next_column ? -from_next : 0.0f);
            store(dnoisy + row + column, d);
        }
    }
}
