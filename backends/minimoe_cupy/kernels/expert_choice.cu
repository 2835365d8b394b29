// expert_choice: each expert takes the c tokens with its largest p; ties go to the lowest token.
//   p [N,E], valid [N] or null -> weights [N,E] (p or 0), ids [N,E] (e or -1), counts [E];  c = min(M, max(1, ceil(M k / E))), M valid tokens
// A radix select: the key of the last token taken is found digit by digit, 8 bits at a time, for all experts at once. Four times:
//   choice_histogram   counts each digit among the keys that agree with the digits found so far
//   choice_digit       finds the digit in which the c-th largest falls, and how many of its keys are still to be taken
// and then
//   choice_ties        counts the keys of each piece of tokens that equal the one found; reads only if not all of those are taken
//   choice_write       writes weights, ids and counts
// Lanes are experts side by side and warps go down the tokens: accesses are coalesced, and each lane has its own bank of shared memory, so no
// two lanes of a warp add to the same address. The host need not know c: the first histogram counts M. Only integers are summed, so the result
// does not depend on the order of blocks.
// Bytes: 4 N E read five times (seven with ties), 8 N E written.   Grids: with each kernel.
// Reference: minimoe/reference/gating.py.   Unproven: no card has run it; unmeasured.
#include "scan.cuh"

constexpr int WARPS = 8;
constexpr int PIECE = 1024;  // tokens per block
constexpr int BITS = 8, BINS = 1 << BITS;
constexpr int BINS_PER_LANE = BINS / WARP;
constexpr int EVERY = 2147483647;  // of the keys that are equal to the last one
constexpr unsigned NOT_A_NUMBER = 0, PADDING = 1u << 24, LOWEST = 2u << 24;  // keys, each with its own first digit

// An integer that orders as the reference does: p by its bits, as p is 0 to 1; padding below every p, NaN below padding.
__device__ inline unsigned choice_key(float p, bool counted) {
    return !counted ? PADDING : p == p ? __float_as_uint(p) + LOWEST : NOT_A_NUMBER;
}

// histogram [BINS,E] += the digits at `shift` of the keys of a piece that agree with prefix [E] in `mask`.
// Grid (ceil(E / 32), pieces), block 32 * WARPS.
__global__ void __launch_bounds__(32 * 8) choice_histogram(
    const float* p, const bool* valid, const unsigned* prefix, int* histogram, int n_tokens, int n_experts, unsigned mask, int shift
) {
    __shared__ int bins[BINS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, expert = blockIdx.x * WARP + lane;
    for (int bin = warp; bin < BINS; bin += WARPS) bins[bin][lane] = 0;
    __syncthreads();
    const int last = int(min((long long)n_tokens, (blockIdx.y + 1ll) * PIECE));
    if (expert < n_experts) {
        const unsigned found = mask ? prefix[expert] : 0;  // nothing is found before the first digit
#pragma unroll 4
        for (int token = blockIdx.y * PIECE + warp; token < last; token += WARPS) {
            const unsigned key = choice_key(p[(long long)token * n_experts + expert], !valid || valid[token]);
            if (((key ^ found) & mask) == 0) atomicAdd(&bins[key >> shift & (BINS - 1)][lane], 1);
        }
    }
    __syncthreads();
    if (expert >= n_experts) return;
    for (int bin = warp; bin < BINS; bin += WARPS)
        if (bins[bin][lane]) atomicAdd(&histogram[bin * n_experts + expert], bins[bin][lane]);
}

// One warp per expert, lanes from the largest digit down. The histogram is left zero for the next digit; the first (mask 0) computes c.
// wanted [E]: how many tokens to take among those that agree so far.   Grid: ceil(E / WARPS).
__global__ void __launch_bounds__(32 * 8) choice_digit(
    int* histogram, unsigned* prefix, int* wanted, int* counts, int n_experts, int k, unsigned mask, int shift
) {
    const int lane = threadIdx.x % WARP, expert = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (expert >= n_experts) return;
    int mine[BINS_PER_LANE], sum = 0;
#pragma unroll
    for (int i = 0; i < BINS_PER_LANE; i++) {
        int* bin = &histogram[(BINS - 1 - lane * BINS_PER_LANE - i) * n_experts + expert];
        mine[i] = *bin;
        *bin = 0;
        sum += mine[i];
    }
    const int upto = warp_inclusive(sum);
    int wants = 0;
    if (mask) {
        wants = wanted[expert];
    } else {
        constexpr int PLACE = BINS - 1 - (PADDING >> 24);  // of the padding's digit
        const int padding = __shfl_sync(ALL_LANES, mine[PLACE % BINS_PER_LANE], PLACE / BINS_PER_LANE);
        const int tokens = __shfl_sync(ALL_LANES, upto, WARP - 1) - padding;
        wants = int(min((long long)tokens, max(1ll, ((long long)tokens * k + n_experts - 1) / n_experts)));
    }
    __syncwarp();  // all have read what one of them writes
    if (lane == 0) counts[expert] = 0;
    if (wants == 0 && lane == 0) {  // nothing is valid
        prefix[expert] = ~0u;
        wanted[expert] = 0;
    }
    int before = upto - sum;
#pragma unroll
    for (int i = 0; i < BINS_PER_LANE; i++) {
        if (before < wants && wants <= before + mine[i]) {
            const unsigned digit = BINS - 1 - lane * BINS_PER_LANE - i;
            prefix[expert] = (mask ? prefix[expert] & mask : 0) | digit << shift;
            wanted[expert] = shift == 0 && wants == before + mine[i] ? EVERY : wants - before;
        }
        before += mine[i];
    }
}

// The tokens of a warp: a strip of a piece.
__device__ inline void strip_of(int warp, int n_tokens, int* first, int* last) {
    const long long begin = (long long)blockIdx.y * PIECE + warp * (PIECE / WARPS);
    *first = int(min((long long)n_tokens, begin));
    *last = int(min((long long)n_tokens, begin + PIECE / WARPS));
}

__device__ inline int equal_in_strip(const float* p, const bool* valid, unsigned found, int first, int last, int n_experts, int expert) {
    int equal = 0;
    for (int token = first; token < last; token++)
        equal += choice_key(p[(long long)token * n_experts + expert], !valid || valid[token]) == found;
    return equal;
}

// ties [pieces,E]; not written where all ties of all experts of the block are taken.   Grid as choice_histogram.
__global__ void __launch_bounds__(32 * 8) choice_ties(
    const float* p, const bool* valid, const unsigned* prefix, const int* wanted, int* ties, int n_tokens, int n_experts
) {
    __shared__ int equal[WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, expert = blockIdx.x * WARP + lane;
    const bool some = expert < n_experts && wanted[expert] != EVERY;
    if (!__syncthreads_or(some)) return;
    int first, last;
    strip_of(warp, n_tokens, &first, &last);
    equal[warp][lane] = some ? equal_in_strip(p, valid, prefix[expert], first, last, n_experts, expert) : 0;
    __syncthreads();
    if (warp || expert >= n_experts) return;
    int sum = 0;
    for (int w = 0; w < WARPS; w++) sum += equal[w][lane];
    ties[(long long)blockIdx.y * n_experts + expert] = sum;
}

// A token is taken if its key is larger than the one found, or equal with fewer than `wanted` equal ones before it. counts += how many.
// Grid as choice_histogram.
__global__ void __launch_bounds__(32 * 8) choice_write(
    const float* p, const bool* valid, const unsigned* prefix, const int* wanted, const int* ties, float* weights, int* ids, int* counts,
    int n_tokens, int n_experts
) {
    __shared__ int before[WARPS][WARP], equal[WARPS][WARP], taken[WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, expert = blockIdx.x * WARP + lane;
    const bool here = expert < n_experts;
    const unsigned found = here ? prefix[expert] : 0;
    const int wants = here ? wanted[expert] : EVERY;
    int first, last, rank = 0, count = 0;  // rank: equal keys so far
    strip_of(warp, n_tokens, &first, &last);
    if (__syncthreads_or(wants != EVERY)) {
        int sum = 0;
        if (wants != EVERY)
            for (int piece = warp; piece < int(blockIdx.y); piece += WARPS) sum += ties[(long long)piece * n_experts + expert];
        before[warp][lane] = sum;
        equal[warp][lane] = wants != EVERY ? equal_in_strip(p, valid, found, first, last, n_experts, expert) : 0;
        __syncthreads();
        for (int w = 0; w < WARPS; w++) rank += before[w][lane] + (w < warp ? equal[w][lane] : 0);
    }
    if (here) {
#pragma unroll 4
        for (int token = first; token < last; token++) {
            const long long place = (long long)token * n_experts + expert;
            const bool counted = !valid || valid[token];
            const float value = p[place];
            const unsigned key = choice_key(value, counted);
            const bool takes = counted && (key > found || (key == found && rank < wants));
            rank += key == found;
            count += takes;
            weights[place] = takes ? value : 0.0f;
            ids[place] = takes ? expert : -1;
        }
    }
    taken[warp][lane] = count;
    __syncthreads();
    if (warp || !here) return;
    for (int w = 1; w < WARPS; w++) count += taken[w][lane];
    if (count) atomicAdd(&counts[expert], count);
}
