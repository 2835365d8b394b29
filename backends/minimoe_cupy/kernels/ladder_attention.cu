// A ladder of attention, to be read from top to bottom: bfloat16 in and out, float32 sums. docs/gpu.md has what each rung costs.
//
// y[b,i,h] = sum over j of softmax(scale q[b,i,h] k[b,j,g])[j] v[b,j,g]      q [B,T,Q,C], k and v [B,T,G,C] -> y [B,T,Q,C]
// Head h of the Q query heads reads key/value head g = h / (Q / G). With `causal`, token i sees the tokens j <= i.
// FLOPs: 4 C for each pair of tokens that is seen.
//
//   attention_scores, attention_softmax, attention_values
//                      the definition, a kernel for each of its three parts.   Bytes: 4 B Q T^2 of scores, written twice, read four times.
//   attention_online   one kernel: a warp per query, which keeps its scores.   Bytes: k and v once for each query.
//   attention_bf16     the one that the backend launches (attention_bf16.cu, attention_mma.cuh), FlashAttention: the same idea for tiles of
//                      queries, multiplied by the tensor cores.                Bytes: k and v once for each tile of 128 queries.
//
// Sums are in the order of the keys, or of a warp's lanes: equal inputs give equal bits. Grids are beside the kernels.
// Reference: minimoe/reference/attention.py.   Unproven: no card has run it.
#include "common.cuh"

// How many tokens a query sees.
__device__ inline int seen_by(int query, int tokens, bool causal) { return causal ? query + 1 : tokens; }

// The head's row of the first token of a sequence in k or v; the next token's is groups * width further.
__device__ inline const bf16* first_row(const bf16* array, int sequence, int head, int tokens, int heads, int groups, int width) {
    return array + ((long long)sequence * tokens * groups + head / (heads / groups)) * width;
}

// ---- the first rung: the definition, in three passes ------------------------------------------------------------------------------------
//
// The matrix of scores is the problem: T^2 floats for each head, which outgrow the caches, written and read again between the passes.

// scores[b,h,i,j] = scale q[b,i,h] k[b,j,g], -infinity where i does not see j.   -> [B,Q,T,T]
// A thread per score. Grid: (ceil(T / 32), ceil(T / 8), B Q), block (32, 8).
__global__ void attention_scores(
    const bf16* q, const bf16* k, float* scores, int tokens, int heads, int groups, int width, float scale, bool causal
) {
    const int sequence = blockIdx.z / heads, head = blockIdx.z % heads;
    const int i = blockIdx.y * blockDim.y + threadIdx.y, j = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= tokens || j >= tokens) return;
    const bf16* query = q + (((long long)sequence * tokens + i) * heads + head) * width;
    const bf16* key = first_row(k, sequence, head, tokens, heads, groups, width) + (long long)j * groups * width;
    float score = -infinity();
    if (j < seen_by(i, tokens, causal)) {
        score = 0.0f;
        for (int c = 0; c < width; c++) score = fmaf(to_float(query[c]), to_float(key[c]), score);
        score *= scale;
    }
    scores[((long long)blockIdx.z * tokens + i) * tokens + j] = score;
}

// Each row of the scores becomes exp(score - largest) / sum. The largest is subtracted so that no exponential overflows.
// A warp per row, which it reads three times. Grid: (T, B Q), block 32.
__global__ void attention_softmax(float* scores, int tokens) {
    float* row = scores + ((long long)blockIdx.y * tokens + blockIdx.x) * tokens;
    float largest = -infinity(), sum = 0.0f;
    for (int j = threadIdx.x; j < tokens; j += WARP) largest = fmaxf(largest, row[j]);
    largest = warp_max(largest);
    for (int j = threadIdx.x; j < tokens; j += WARP) sum += expf(row[j] - largest);
    sum = warp_sum(sum);
    for (int j = threadIdx.x; j < tokens; j += WARP) row[j] = expf(row[j] - largest) / sum;
}

// y[b,i,h,c] = sum over j of weights[b,h,i,j] v[b,j,g,c].
// A thread per result. Grid: (ceil(C / 32), ceil(T / 8), B Q), block (32, 8).
__global__ void attention_values(
    const float* weights, const bf16* v, bf16* y, int tokens, int heads, int groups, int width, bool causal
) {
    const int sequence = blockIdx.z / heads, head = blockIdx.z % heads;
    const int i = blockIdx.y * blockDim.y + threadIdx.y, c = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= tokens || c >= width) return;
    const float* row = weights + ((long long)blockIdx.z * tokens + i) * tokens;
    const bf16* values = first_row(v, sequence, head, tokens, heads, groups, width) + c;
    float sum = 0.0f;
    for (int j = 0; j < seen_by(i, tokens, causal); j++) sum = fmaf(row[j], to_float(values[(long long)j * groups * width]), sum);
    y[(((long long)sequence * tokens + i) * heads + head) * width + c] = from_float<bf16>(sum);
}

// ---- the second rung: the softmax as the scores arrive ----------------------------------------------------------------------------------
//
// The softmax needs the largest score and the sum of all exponentials, and seems to need all scores for that. But both can be kept up to
// date while scores arrive (Milakov & Gimelshein 2018). Let `largest` be the largest score so far, and
//
//     total = sum over j of exp(score[j] - largest),      sum[c] = sum over j of exp(score[j] - largest) v[j,c].
//
// If a larger score arrives, then exp(largest - larger) times both is what they would have been with the larger one. In the end sum /
// total is the result, and no score was ever in memory. A warp takes 32 keys at a time: first a key per lane, for the scores; then
// COLUMNS columns of v per lane, 32 apart, for the sums, where each key's weight comes from its lane by a shuffle.
// COLUMNS: ceil(C / 32). Grid: ceil(B T Q / 4), block 128.

constexpr int WARPS = 4;  // of a block

template <int COLUMNS>
__global__ void __launch_bounds__(WARPS * WARP) attention_online(
    const bf16* q, const bf16* k, const bf16* v, bf16* y, int sequences, int tokens, int heads, int groups, int width, float scale,
    bool causal
) {
    const int row = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= sequences * tokens * heads) return;
    const int head = row % heads, i = row / heads % tokens, sequence = row / heads / tokens;
    const long long step = groups * width;  // from a token's key to the next one's
    const bf16* query = q + (long long)row * width;
    const bf16* key = first_row(k, sequence, head, tokens, heads, groups, width) + lane * step;
    const bf16* value = first_row(v, sequence, head, tokens, heads, groups, width) + lane;
    const int seen = seen_by(i, tokens, causal);
    float largest = -infinity(), total = 0.0f, sum[COLUMNS] = {};
    for (int start = 0; start < seen; start += WARP) {
        float score = -infinity();
        if (start + lane < seen) {
            score = 0.0f;
            for (int c = 0; c < width; c++) score = fmaf(to_float(query[c]), to_float(key[c]), score);
            score *= scale;
        }
        key += WARP * step;
        const float larger = fmaxf(largest, warp_max(score)), rescale = expf(largest - larger), weight = expf(score - larger);
        largest = larger;
        total = total * rescale + warp_sum(weight);
#pragma unroll
        for (int n = 0; n < COLUMNS; n++) sum[n] *= rescale;
        for (int other = 0; other < min(WARP, seen - start); other++) {
            const float its_weight = __shfl_sync(ALL_LANES, weight, other);
#pragma unroll
            for (int n = 0; n < COLUMNS; n++)
                if (lane + n * WARP < width) sum[n] = fmaf(its_weight, to_float(value[n * WARP]), sum[n]);
            value += step;
        }
    }
    bf16* result = y + (long long)row * width + lane;
#pragma unroll
    for (int n = 0; n < COLUMNS; n++)
        if (lane + n * WARP < width) result[n * WARP] = from_float<bf16>(sum[n] / total);
}
