// route_select: from the plan that drops nothing (route.cu), the plan whose experts keep their pairs of largest weight; ties go to the first.
//   weights [N,W], all [P] and starts [E+1]: order and offsets without a capacity -> order [R], offsets [E+1]; inverse [N,W] rewritten
// One block per expert. If it has more pairs than `capacity`, a radix select over its pairs, 8 bits at a time, finds the weight of the last one
// kept: digits are counted in shared memory, and one lane adds for all lanes with the same digit. Kept pairs stay in their order.
// Only integers are summed; nothing is sorted, and nothing is copied to the host.
// Bytes: 12 P read, and 8 more per digit for experts over capacity; 8 P written.   Grid: E, block 1024.
// Reference: minimoe/reference/routing.py.   Unproven: no card has run it; unmeasured.
#include "scan.cuh"
#include "select.cuh"

constexpr int WARPS = 32, THREADS = WARPS * WARP;
constexpr int BITS = 8, BINS = 1 << BITS;

// How many pairs the experts keep together: all of them, and those before this block's. All threads of the block get both.
__device__ inline void kept_rows(const int* starts, int limit, int n_experts, int* sums, int* all, int* before) {
    int mine = 0, earlier = 0;
    for (int e = threadIdx.x; e < n_experts; e += THREADS) {
        const int rows = min(starts[e + 1] - starts[e], limit);
        mine += rows;
        if (e < int(blockIdx.x)) earlier += rows;
    }
    block_exclusive<WARPS>(mine, sums, *all);
    block_exclusive<WARPS>(earlier, sums, *before);
}

// The key of the `wanted`-th largest weight of the pairs, 1 <= wanted <= count; wanted becomes how many to keep of those equal to it.
__device__ inline unsigned last_key(const float* weights, const int* pairs, int count, int* bins, int* found, int& wanted) {
    const int lane = threadIdx.x % WARP;
    unsigned prefix = 0, mask = 0;
    int total;
    for (int shift = 32 - BITS; shift >= 0; shift -= BITS) {
        if (threadIdx.x < BINS) bins[threadIdx.x] = 0;
        __syncthreads();
        for (int first = 0; first < count; first += THREADS) {
            const int i = first + threadIdx.x;
            const unsigned key = i < count ? unsigned_key(weights[pairs[i]]) : 0;
            const int digit = i < count && ((key ^ prefix) & mask) == 0 ? int(key >> shift & (BINS - 1)) : BINS;
            const unsigned same = __match_any_sync(ALL_LANES, digit);
            if (digit < BINS && (same & ((1u << lane) - 1)) == 0) atomicAdd(&bins[digit], __popc(same));
        }
        __syncthreads();
        const int digit = BINS - 1 - int(threadIdx.x);  // from the largest down
        const int here = digit >= 0 ? bins[digit] : 0, before = block_exclusive<WARPS>(here, found + 2, total);
        if (before < wanted && wanted <= before + here) {
            found[0] = digit;
            found[1] = wanted - before;
        }
        __syncthreads();
        prefix |= unsigned(found[0]) << shift;
        mask |= unsigned(BINS - 1) << shift;
        wanted = found[1];
        __syncthreads();
    }
    return prefix;
}

__global__ void __launch_bounds__(1024) route_select(
    const float* weights, const int* all, const int* starts, const long long* capacity_at, int capacity, int* order, int* inverse,
    int* offsets, int n_experts, int n_rows
) {
    __shared__ int bins[BINS], found[2 + WARPS];
    int* sums = found + 2;
    const long long asked = capacity_at ? *capacity_at : capacity;
    const int limit = int(max(0ll, min(asked, 2147483647ll))), expert = blockIdx.x;
    const int count = starts[expert + 1] - starts[expert];
    const int* pairs = all + starts[expert];
    int used, row, total;
    kept_rows(starts, limit, n_experts, sums, &used, &row);
    if (threadIdx.x == 0) {
        offsets[expert] = row;
        if (expert == n_experts - 1) offsets[n_experts] = used;
    }

    unsigned last = 0;  // less than every key
    int wanted = min(count, limit), equal = 0;  // equal: keys like the last one so far, of which `wanted` are kept
    if (count > limit && limit > 0) last = last_key(weights, pairs, count, bins, found, wanted);
    const bool some = wanted > 0;
    for (int first = 0; first < count; first += THREADS) {
        const int i = first + threadIdx.x, pair = i < count ? pairs[i] : -1;
        const unsigned key = pair >= 0 && some ? unsigned_key(weights[pair]) : 0;
        const bool above = some && pair >= 0 && key > last, ties = some && pair >= 0 && key == last;
        const int before = block_exclusive<WARPS>(int(above) | int(ties) << 16, sums, total);  // two sums, each up to 1024
        const int rank = equal + (before >> 16), place = row + (before & 0xffff) + min(rank, wanted) - min(equal, wanted);
        if (pair >= 0) {
            const bool kept = (above || (ties && rank < wanted)) && place < n_rows;
            if (kept) order[place] = pair;
            inverse[pair] = kept ? place : -1;
        }
        row += (total & 0xffff) + min(equal + (total >> 16), wanted) - min(equal, wanted);
        equal += total >> 16;
    }
    const long long step = (long long)gridDim.x * THREADS;
    for (long long rest = used + (long long)blockIdx.x * THREADS + threadIdx.x; rest < n_rows; rest += step) order[rest] = 0;
}
