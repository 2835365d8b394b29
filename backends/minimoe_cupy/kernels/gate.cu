// gate: from a router's logits z to each token's experts and weights.
//   logits [N,E] -> weights [N,K], ids [N,K], scores [N,E], and per block the counts and the sums of the probabilities [blocks,E]
//   SOFTMAX_TOPK   p = softmax(z); the k largest p, divided by their sum if `norm`
//   TOPK_SOFTMAX   softmax over the k largest z
//   SIGMOID_BIAS   s = sigmoid(z); the k largest s + bias within the best groups; s, divided by its sum if `norm`, times `scale`
//   ALL            only p and its sums: expert choice continues from there (expert_choice.cu)
// One warp per token, with the row in registers: PER_LANE logits per lane, V = 4 of them (16 bytes) per access where E > 64 is a multiple of 4;
// the next token's row is loaded meanwhile. The k largest are found one after the other (select.cuh). The grid has a fixed cap and its warps
// stride over the tokens; each block sums its counts and probabilities in a fixed order, and partials.cu adds the blocks.
// A row with NaN has NaN weights and ids in range. Tokens that are not valid get experts too, but are not counted.
// Bytes: 4 N E read, 4 N (E + 2 K) written, 8 blocks E.   Block 32 * WARPS, grid at most ceil(N / WARPS).
// Shared: 8 E, and with groups WARPS * 4 (E + n_groups).   Reference: minimoe/reference/gating.py.   Unproven: no card has run it.
#include "gate.cuh"

extern __shared__ unsigned char dynamic_shared[];

__device__ inline float sigmoid(float z) { return __fdividef(1.0f, 1.0f + expf(-(z < -80.0f ? -80.0f : z))); }

// z becomes softmax(z), 0 past the row's end.
template <int PER_LANE>
__device__ inline void softmax_row(float (&z)[PER_LANE]) {
    float top = -infinity(), sum = 0.0f;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) top = fmaxf(top, z[j]);  // ignores a NaN, which the sum then restores
    top = warp_max(top);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        z[j] = expf(z[j] - top);
        sum += z[j];
    }
    const float share = 1.0f / warp_sum(sum);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) z[j] *= share;
}

// The key of the sum of the two largest of a group's keys, found by `parts` lanes, of which this is number `part`. Lanes of different groups
// start at different offsets, so that they read different banks of shared memory.
__device__ inline int group_key(const int* keys, int size, int group, int part, int parts) {
    int first = TAKEN, second = TAKEN;
    const int rounds = (size + parts - 1) / parts;
    for (int i = 0; i < rounds; i++) {
        const int member = (i + group) % rounds * parts + part;
        const int key = member < size ? keys[group * size + member] : TAKEN;
        second = max(second, min(first, key));
        first = max(first, key);
    }
    for (int offset = parts / 2; offset; offset /= 2) {
        const int other = __shfl_xor_sync(ALL_LANES, first, offset), next = __shfl_xor_sync(ALL_LANES, second, offset);
        second = max(max(second, next), min(first, other));
        first = max(first, other);
    }
    return key_of(size > 1 ? value_of(first) + value_of(second) : value_of(first));
}

// Keys outside the best groups become that of -infinity. `shared` [E + n_groups] belongs to the warp.
template <int V, int PER_LANE>
__device__ inline void drop_groups(int (&keys)[PER_LANE], int n_experts, int n_groups, int top_groups, int* shared, int lane) {
    int* group_keys = shared + n_experts;
    const int size = n_experts / n_groups;
    __syncwarp();  // the previous token no longer needs them
#pragma unroll
    for (int j = 0; j < PER_LANE; j++)
        if (lane * V + column_of<V>(j) < n_experts) shared[lane * V + column_of<V>(j)] = keys[j];
    __syncwarp();
    int parts = WARP;
    while (parts > 1 && parts * n_groups > WARP) parts /= 2;
    for (int first = 0; first < n_groups; first += WARP / parts) {
        const int group = first + lane / parts;
        const int key = group_key(shared, size, min(group, n_groups - 1), lane % parts, parts);
        if (group < n_groups && lane % parts == 0) group_keys[group] = key;
    }
    __syncwarp();
    for (int group = 0; group < n_groups; group++) {
        const int key = group_keys[group];
        int ahead = 0;  // groups that come before it, by key and then by number
        for (int other = lane; other < n_groups; other += WARP)
            ahead += group_keys[other] > key || (group_keys[other] == key && other < group);
        for (int offset = WARP / 2; offset; offset /= 2) ahead += __shfl_xor_sync(ALL_LANES, ahead, offset);
        if (ahead < top_groups) continue;
        for (int member = lane; member < size; member += WARP) shared[group * size + member] = key_of(-infinity());
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < PER_LANE; j++)
        if (lane * V + column_of<V>(j) < n_experts) keys[j] = shared[lane * V + column_of<V>(j)];
}

// The k largest keys: ids and weights of a token, lane by slot, 32 slots at a time. z: its logits; counts [E]: shared, or null.
template <int KIND, int V, int PER_LANE>
__device__ inline void choose(
    int (&keys)[PER_LANE], const float* z, float* weights, int* ids, int* counts, int k, bool norm, float scale, int lane
) {
    float value = 0.0f, sum = 0.0f, highest = 0.0f;
    for (int first = 0; first < k; first += WARP) {
        const int slots = min(WARP, k - first);
        int expert = 0, key = 0;
        for (int slot = 0; slot < slots; slot++) {
            int top;
            const int best = take_best<V>(keys, top, lane);
            if (lane == slot) {
                expert = best;
                key = top;
            }
        }
        if (first == 0) highest = value_of(__shfl_sync(ALL_LANES, key, 0));
        if (lane >= slots) continue;  // only in the last round, and no warp operation follows in this loop
        value = KIND == SIGMOID_BIAS ? sigmoid(z[expert]) : KIND == TOPK_SOFTMAX ? expf(value_of(key) - highest) : value_of(key);
        sum += value;
        ids[first + lane] = expert;
        if (counts) atomicAdd(&counts[expert], 1);
        if (first + WARP < k) weights[first + lane] = value;
    }
    sum = warp_sum(sum);
    if (KIND == SIGMOID_BIAS) sum += TINY;
    const int last = (k - 1) / WARP * WARP;
    for (int slot = lane; slot < last; slot += WARP) weights[slot] = (norm ? weights[slot] / sum : weights[slot]) * scale;
    if (last + lane < k) weights[last + lane] = (norm ? value / sum : value) * scale;
}

// The bound's second number keeps the compiler from spilling a few registers for one more block on a processor.
template <int KIND, int PER_LANE, int V>
__global__ void __launch_bounds__(32 * 8, PER_LANE > 16 ? 1 : 2) gate(
    const float* logits, const float* bias, const bool* valid, float* weights, int* ids, float* scores, float* prob_parts,
    int* count_parts, int n_tokens, int n_experts, int k, bool norm, float scale, int n_groups, int top_groups
) {
    float* sums = reinterpret_cast<float*>(dynamic_shared);
    int* counts = reinterpret_cast<int*>(sums + n_experts);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int* groups = counts + n_experts + warp * (n_experts + n_groups);
    const long long step = (long long)gridDim.x * WARPS;
    long long token = (long long)blockIdx.x * WARPS + warp;
    constexpr bool AHEAD = PER_LANE <= 8;

    for (int e = threadIdx.x; e < n_experts; e += WARPS * WARP) counts[e] = 0;
    __syncthreads();
    float total[PER_LANE] = {}, shift[PER_LANE] = {}, next[PER_LANE];
    if (KIND == SIGMOID_BIAS && bias) load_row<V>(bias, n_experts, 0.0f, shift, lane);
    if (AHEAD && token < n_tokens) load_row<V>(logits + token * n_experts, n_experts, -infinity(), next, lane);
    for (; token < n_tokens; token += step) {
        const float* z = logits + token * n_experts;
        float p[PER_LANE];
        int keys[PER_LANE];
        if (!AHEAD) load_row<V>(z, n_experts, -infinity(), next, lane);
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) p[j] = next[j];
        if (AHEAD && token + step < n_tokens) load_row<V>(z + step * n_experts, n_experts, -infinity(), next, lane);

        const bool counted = !valid || valid[token];
        float share = 1.0f;
        if (KIND == TOPK_SOFTMAX) write_keys<V>(p, n_experts, keys, lane);
        if (KIND == SIGMOID_BIAS) {
            float sum = 0.0f, choice[PER_LANE];
#pragma unroll
            for (int j = 0; j < PER_LANE; j++) {
                p[j] = lane * V + column_of<V>(j / V * V) < n_experts ? sigmoid(p[j]) : 0.0f;
                sum += p[j];
                choice[j] = p[j] + shift[j];
            }
            share = 1.0f / (warp_sum(sum) + TINY);
            write_keys<V>(choice, n_experts, keys, lane);
            if (n_groups > 1) drop_groups<V>(keys, n_experts, n_groups, top_groups, groups, lane);
        } else {
            softmax_row(p);
        }
        if (KIND == SOFTMAX_TOPK) write_keys<V>(p, n_experts, keys, lane);
        store_row<V>(scores + token * n_experts, n_experts, p, lane);
        if (counted) {
#pragma unroll
            for (int j = 0; j < PER_LANE; j++) total[j] += p[j] * share;
        }
        if (KIND != ALL) choose<KIND, V>(keys, z, weights + token * k, ids + token * k, counted ? counts : nullptr, k, norm, scale, lane);
    }

    add_over_warps<WARPS, V>(total, n_experts, sums);  // ends with a barrier: the counts are complete too
    for (int e = threadIdx.x; e < n_experts; e += WARPS * WARP) {
        prob_parts[(long long)blockIdx.x * n_experts + e] = sums[e];
        if (KIND != ALL) count_parts[(long long)blockIdx.x * n_experts + e] = counts[e];
    }
}
