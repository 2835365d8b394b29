// gate_backward: from the gradients of a gate's weights and of its sums of probabilities to the gradient of its logits.
//   dweights [N,W] or null, dprob_sum [E] or null, weights, ids [N,W], scores [N,E], valid [N] or null -> dlogits [N,E]
// With d = dprob_sum (0 for a token that is not valid) and a = what the slots pass back, each at its expert:
//   SOFTMAX_TOPK   dz = p (a + d - sum((a + d) p)),   a = dw, or (dw - <dw, w>) / sum(chosen p) if `norm`
//   TOPK_SOFTMAX   dz = a + p (d - sum(d p)),         a = w (dw - <dw, w>)
//   SIGMOID_BIAS   dz = (a + (d - sum(d s) / S) / S) s (1 - s), S = sum(s), a = c dw, or (c dw - <dw, w>) / sum(chosen s), c: `scale`
//   ALL            dz as SOFTMAX_TOPK,                a = dw where the expert has chosen the token; W = E
// One warp per token, its scores in registers as select.cuh lays them out, read once; dz is written once. Slots come 32 at a time, one per
// lane, and are broadcast to their expert's lane in order, without atomics. ids outside of 0 .. E-1 pass nothing back.
// Bytes: 4 N (2 E + 3 W), for ALL 16 N E.   Block 32 * WARPS, grid at most ceil(N / WARPS).
// Reference: minimoe/reference/gating.py.   Unproven: no card has run it.
#include "gate.cuh"

// Adds a, for the rules with slots, to `to`.
template <int V, int PER_LANE>
__device__ inline void add_slots(
    float (&to)[PER_LANE], const float* dweights, const float* weights, const int* ids, const float* scores, int kind, int n_experts,
    int width, bool norm, float scale, int lane
) {
    float inner = 0.0f, chosen = 0.0f;
    for (int slot = lane; slot < width; slot += WARP) {
        const int expert = ids[slot];
        inner += dweights[slot] * weights[slot];
        if (expert >= 0 && expert < n_experts) chosen += scores[expert];
    }
    inner = warp_sum(inner);
    chosen = warp_sum(chosen) + (kind == SIGMOID_BIAS ? TINY : 0.0f);
    const float shift = norm || kind == TOPK_SOFTMAX ? inner : 0.0f, rate = norm ? 1.0f / chosen : 1.0f;
    for (int first = 0; first < width; first += WARP) {
        int expert = -1;
        float value = 0.0f;
        if (first + lane < width) {
            expert = ids[first + lane];
            value = (dweights[first + lane] * scale - shift) * (kind == TOPK_SOFTMAX ? weights[first + lane] : rate);
        }
        for (int slot = 0; slot < min(WARP, width - first); slot++) {
            const int here = __shfl_sync(ALL_LANES, expert, slot) - lane * V;
            const float part = __shfl_sync(ALL_LANES, value, slot);
#pragma unroll
            for (int j = 0; j < PER_LANE; j++) to[j] += here == column_of<V>(j) ? part : 0.0f;
        }
    }
}

// a for expert choice: dweights where the id is not -1.
template <int V, int PER_LANE>
__device__ inline void add_chosen(float (&to)[PER_LANE], const float* dweights, const int* ids, int n_experts, int lane) {
#pragma unroll
    for (int j = 0; j < PER_LANE; j += V) {
        const int column = lane * V + column_of<V>(j);
        if (column >= n_experts) continue;
        float part[V];
        load(dweights + column, part);
#pragma unroll
        for (int i = 0; i < V; i++) to[j + i] += ids[column + i] >= 0 ? part[i] : 0.0f;
    }
}

// The bound's second number: as in gate.cu.
template <int PER_LANE, int V>
__global__ void __launch_bounds__(32 * 8, PER_LANE > 16 ? 1 : 2) gate_backward(
    const float* dweights, const float* dprob_sum, const float* weights, const int* ids, const float* scores, const bool* valid,
    float* dlogits, int kind, int n_tokens, int n_experts, int width, bool norm, float scale
) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float dsum[PER_LANE] = {};
    if (dprob_sum) load_row<V>(dprob_sum, n_experts, 0.0f, dsum, lane);
    for (long long token = (long long)blockIdx.x * WARPS + warp; token < n_tokens; token += (long long)gridDim.x * WARPS) {
        const bool counted = dprob_sum && (!valid || valid[token]);
        const long long slots = token * width;
        float p[PER_LANE], dz[PER_LANE] = {};
        load_row<V>(scores + token * n_experts, n_experts, 0.0f, p, lane);
        if (dweights && kind == ALL) add_chosen<V>(dz, dweights + slots, ids + slots, n_experts, lane);
        else if (dweights)
            add_slots<V>(
                dz, dweights + slots, weights + slots, ids + slots, scores + token * n_experts, kind, n_experts, width, norm, scale, lane
            );

        float product = 0.0f, row = 0.0f;  // over the row: of the gradient with p, of p
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) {
            const float d = counted ? dsum[j] : 0.0f;
            product += (kind == TOPK_SOFTMAX || kind == SIGMOID_BIAS ? d : dz[j] + d) * p[j];
            row += p[j];
        }
        product = warp_sum(product);
        row = 1.0f / (warp_sum(row) + TINY);
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) {
            const float d = counted ? dsum[j] : 0.0f;
            if (kind == SIGMOID_BIAS) {
                if (dprob_sum) dz[j] += (d - product * row) * row;
                dz[j] *= p[j] * (1.0f - p[j]);
            } else if (kind == TOPK_SOFTMAX) dz[j] += p[j] * (d - product);
            else dz[j] = p[j] * (dz[j] + d - product);
        }
        store_row<V>(dlogits + token * n_experts, n_experts, dz, lane);
    }
}
