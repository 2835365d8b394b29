// route: the plan, a stable counting sort of the P = N W pairs (token, slot) by expert.
//   ids [N,W] (-1: none), valid [N] or null, capacity -> order [R], inverse [N,W], offsets [E+1]
//   route_count   one block per PAIRS pairs: how many go to each expert                                 -> counts [E,blocks]
//   route_scan    one block per expert: how many of its pairs come before each block, and their number   -> counts in place, totals [E]
//   route_place   a pair's row = the first row of its expert + the pairs before its block + its rank in the block
// With priority by position this is all: a rank at or past the capacity has no row. By probability, all pairs get rows, and route_select.cu
// continues. The rank in a block: a warp takes 32 neighbours at a time; one match tells each lane which lanes have its expert, the lower ones are
// counted, and shared memory holds what the warp has counted for the expert so far. Only integers are summed, so the order of blocks does
// not matter.
// An id outside of 0 .. E-1 is none. Unused rows are 0 in `order`. A pair for which R rows leave no room gets none.
// Bytes: 8 P read, 8 P written, 16 E blocks.   Grid: ceil(P / PAIRS), block 256.
// Reference: minimoe/reference/routing.py.   Unproven: no card has run it; unmeasured, intended: 60 us for P = 524288, E = 256.
#include "scan.cuh"

constexpr int WARPS = 8, THREADS = WARPS * WARP;
constexpr int ROUNDS = 8, PAIRS = THREADS * ROUNDS;
extern __shared__ unsigned char dynamic_shared[];

// The expert of a pair, E for none.
__device__ inline int expert_of(long long pair, const int* ids, const bool* valid, int n_pairs, int width, int n_experts) {
    if (pair >= n_pairs) return n_experts;
    const int expert = ids[pair];
    return expert >= 0 && expert < n_experts && (!valid || valid[unsigned(pair) / unsigned(width)]) ? expert : n_experts;
}

// The number of rows that an expert may have.
__device__ inline int limit_of(const long long* capacity_at, int capacity) {
    const long long limit = capacity_at ? *capacity_at : capacity;
    return int(max(0ll, min(limit, 2147483647ll)));
}

// Shared: 4 E.
__global__ void __launch_bounds__(256) route_count(const int* ids, const bool* valid, int* counts, int n_pairs, int width, int n_experts) {
    int* mine = reinterpret_cast<int*>(dynamic_shared);
    for (int e = threadIdx.x; e < n_experts; e += THREADS) mine[e] = 0;
    __syncthreads();
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        const long long pair = (long long)blockIdx.x * PAIRS + round * THREADS + threadIdx.x;
        const int expert = expert_of(pair, ids, valid, n_pairs, width, n_experts);
        if (expert < n_experts) atomicAdd(&mine[expert], 1);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < n_experts; e += THREADS) counts[(long long)e * gridDim.x + blockIdx.x] = mine[e];
}

// Grid: E.
__global__ void __launch_bounds__(256) route_scan(int* counts, int* totals, int blocks) {
    __shared__ int sums[WARPS];
    int* row = counts + (long long)blockIdx.x * blocks;
    int before = 0, total;
    for (int first = 0; first < blocks; first += THREADS) {
        const int block = first + threadIdx.x, count = block < blocks ? row[block] : 0;
        const int start = before + block_exclusive<WARPS>(count, sums, total);
        if (block < blocks) row[block] = start;
        before += total;
    }
    if (threadIdx.x == 0) totals[blockIdx.x] = before;
}

// first [E+1]: the first row of each expert, and their number, none having more than `limit`. All threads of the block.
__device__ inline void first_rows(const int* totals, int limit, int* first, int* sums, int n_experts) {
    int before = 0, total;
    for (int tile = 0; tile < n_experts; tile += THREADS) {
        const int e = tile + threadIdx.x, rows = e < n_experts ? min(totals[e], limit) : 0;
        const int start = before + block_exclusive<WARPS>(rows, sums, total);
        if (e < n_experts) first[e] = start;
        before += total;
    }
    if (threadIdx.x == 0) first[n_experts] = before;
}

// starts: what route_scan made of the counts.   Shared: 4 (WARPS E + E + 1). The bound's second number: as in gate.cu.
__global__ void __launch_bounds__(256, 2) route_place(
    const int* ids, const bool* valid, const int* starts, const int* totals, const long long* capacity_at, int capacity, int* order,
    int* inverse, int* offsets, int n_pairs, int width, int n_experts, int n_rows
) {
    __shared__ int sums[WARPS];
    int* seen = reinterpret_cast<int*>(dynamic_shared);  // [WARPS,E]: how many of an expert a warp has seen
    int* first = seen + WARPS * n_experts;  // [E+1]
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int* counts = seen + warp * n_experts;
    for (int i = threadIdx.x; i < WARPS * n_experts; i += THREADS) seen[i] = 0;
    first_rows(totals, limit_of(capacity_at, capacity), first, sums, n_experts);
    __syncthreads();

    const long long begin = (long long)blockIdx.x * PAIRS + warp * (PAIRS / WARPS) + lane;
    int experts[ROUNDS], ranks[ROUNDS];
#pragma unroll
    for (int round = 0; round < ROUNDS; round++)
        experts[round] = expert_of(begin + round * WARP, ids, valid, n_pairs, width, n_experts);
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        const int expert = experts[round];
        const unsigned same = __match_any_sync(ALL_LANES, expert);
        const int below = __popc(same & ((1u << lane) - 1)), before = expert < n_experts ? counts[expert] : 0;
        __syncwarp();  // all have read what one of them writes
        if (below == 0 && expert < n_experts) counts[expert] = before + __popc(same);
        __syncwarp();
        ranks[round] = before + below;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < n_experts; e += THREADS) {
        int before = starts[(long long)e * gridDim.x + blockIdx.x];
        for (int w = 0; w < WARPS; w++) {
            const int count = seen[w * n_experts + e];
            seen[w * n_experts + e] = before;
            before += count;
        }
    }
    __syncthreads();
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        const long long pair = begin + round * WARP;
        if (pair >= n_pairs) break;
        const int expert = experts[round];
        int row = -1;
        if (expert < n_experts) {
            const int rank = counts[expert] + ranks[round];
            row = rank < first[expert + 1] - first[expert] ? first[expert] + rank : -1;
            if (row >= n_rows) row = -1;
            if (row >= 0) order[row] = int(pair);
        }
        inverse[pair] = row;
    }

    if (blockIdx.x == 0)
        for (int e = threadIdx.x; e <= n_experts; e += THREADS) offsets[e] = first[e];
    const long long step = (long long)gridDim.x * THREADS;
    for (long long row = first[n_experts] + (long long)blockIdx.x * THREADS + threadIdx.x; row < n_rows; row += step) order[row] = 0;
}
