// gate_softmax_topk: p = softmax(z); the k largest p, ties to the lowest expert, over their sum if `norm`, with counts and sums of p.
// logits [N,E] -> weights [N,K], ids [N,K], scores p [N,E], counts [E], prob_sum [E]; E <= MAX_EXPERTS, N > 0, 1 <= K <= E.
// One warp a token, from logits to all outputs in one launch. A row with a NaN has NaN weights and the experts 0 .. K-1.
// prob_sum is added warp by warp, then block by block, by the block that ends last: equal inputs give equal bits, no atomics on floats.
// Scratch: partial_counts and partial_probs [blocks,E], any content; ticket [1], zero, and left zero.
// Bytes: N*E read, N*(E + 2K) written.   Grid: ceil(N / WARPS), block 32 * WARPS.   Defined in minimoe/reference/gating.py.

constexpr int WARPS = 4;
constexpr int MAX_EXPERTS = 256;
constexpr int PER_LANE = MAX_EXPERTS / 32;  // lane l holds the experts l, l + 32, ...
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float LOWEST = -3.402823466e38f;

__device__ float warp_max(float value) {
    for (int offset = 16; offset; offset /= 2) value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, offset));
    return value;
}

__device__ float warp_sum(float value) {
    for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(ALL_LANES, value, offset);
    return value;
}

// p[j] = softmax(z)[lane + 32 j], 0 past the last expert.
__device__ void softmax(const float* z, float (&p)[PER_LANE], int lane, int n_experts) {
    float top = LOWEST, sum = 0.0f;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        p[j] = lane + 32 * j < n_experts ? z[lane + 32 * j] : LOWEST;
        top = fmaxf(top, p[j]);  // fmaxf passes over a NaN, which the sum then brings back
    }
    top = warp_max(top);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        p[j] = lane + 32 * j < n_experts ? expf(p[j] - top) : 0.0f;
        sum += p[j];
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) p[j] /= sum;
}

// The expert of the largest p among those not yet taken; NaN counts as -1, below every p. All lanes get the same answer.
__device__ int take_largest(const float (&p)[PER_LANE], unsigned& taken, int lane, int n_experts, float* value) {
    float best = -2.0f;
    int expert = n_experts;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        float key = p[j] >= 0.0f ? p[j] : -1.0f;
        if (lane + 32 * j < n_experts && !(taken >> j & 1u) && key > best) {
            best = key;
            expert = lane + 32 * j;
        }
    }
    for (int offset = 16; offset; offset /= 2) {
        float other = __shfl_xor_sync(ALL_LANES, best, offset);
        int other_expert = __shfl_xor_sync(ALL_LANES, expert, offset);
        if (other > best || (other == best && other_expert < expert)) {
            best = other;
            expert = other_expert;
        }
    }
    if (expert % 32 == lane) taken |= 1u << (expert / 32);
    *value = best < 0.0f ? 0.0f / 0.0f : best;
    return expert;
}

__global__ void gate_softmax_topk(
    const float* logits, float* weights, int* ids, float* scores, int* counts, float* prob_sum,
    int* partial_counts, float* partial_probs, int* ticket, int n_tokens, int n_experts, int k, int norm
) {
    __shared__ float block_probs[WARPS][MAX_EXPERTS];
    __shared__ int block_counts[MAX_EXPERTS];
    __shared__ int is_last;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const long long token = (long long)blockIdx.x * WARPS + warp;
    for (int e = threadIdx.x; e < n_experts; e += blockDim.x) block_counts[e] = 0;
    __syncthreads();

    float p[PER_LANE] = {};
    if (token < n_tokens) {  // the same for all lanes of a warp
        softmax(logits + token * n_experts, p, lane, n_experts);
        unsigned taken = 0;
        float total = 0.0f;
        for (int slot = 0; slot < k; slot++) {
            float value;
            int expert = take_largest(p, taken, lane, n_experts, &value);
            total += value;
            if (slot % 32 == lane) {
                weights[token * k + slot] = value;
                ids[token * k + slot] = expert;
                atomicAdd(&block_counts[expert], 1);
            }
        }
        for (int slot = lane; norm && slot < k; slot += 32) weights[token * k + slot] /= total;  // each lane its own writes
    }
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        int e = lane + 32 * j;
        if (e < n_experts) block_probs[warp][e] = p[j];
        if (e < n_experts && token < n_tokens) scores[token * n_experts + e] = p[j];
    }
    __syncthreads();

    for (int e = threadIdx.x; e < n_experts; e += blockDim.x) {
        float sum = 0.0f;
        for (int w = 0; w < WARPS; w++) sum += block_probs[w][e];
        partial_probs[blockIdx.x * n_experts + e] = sum;
        partial_counts[blockIdx.x * n_experts + e] = block_counts[e];
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(ticket, 1) == (int)gridDim.x - 1;
    __syncthreads();
    if (!is_last) return;

    __threadfence();
    for (int e = threadIdx.x; e < n_experts; e += blockDim.x) {
        float sum = 0.0f;
        int count = 0;
        for (unsigned block = 0; block < gridDim.x; block++) {
            sum += partial_probs[block * n_experts + e];
            count += partial_counts[block * n_experts + e];
        }
        prob_sum[e] = sum;
        counts[e] = count;
    }
    if (threadIdx.x == 0) *ticket = 0;
}
