// A stable radix sort of ids by the row that they name, with the position at which each was: 8 bits at a time from the lowest.
//                                                                                   keys, turn [N] <- ids [N];  T = ceil(N / TILE)
// For each 8 bits: count_digits, scan_counts, place_keys, with one block per tile of TILE keys. A key's new position is the start of its
// digit, plus the keys with that digit in earlier tiles, in earlier warps, and before it in its warp. Only integers are summed, and the
// result does not depend on the order of blocks. An id that names no row becomes the key `rows`, which sorts last.
// Bytes: (8 or 12) N read and 8 N written for each 8 bits.   Grids: with each kernel.
// Reference: xp.argsort(ids, stable=True).   Unproven: no card has run it.
#include "row_of.cuh"
#include "scan.cuh"

constexpr int BLOCK = 256, WARPS = BLOCK / WARP, ITEMS = 4, TILE = BLOCK * ITEMS;
constexpr int BITS = 8, DIGITS = 1 << BITS;  // one thread of a block each

// A tile's keys, 32 * ITEMS consecutive ones per warp, and each one's rank among the keys of its warp with its digit; counts [warp][digit], in
// shared memory, becomes the number of those. A key past the end has no digit.
struct Ranked {
    int key[ITEMS], digit[ITEMS], rank[ITEMS];
    long long first;  // the index of the thread's first key; the next is a warp further
};

__device__ inline void rank_in_warps(Ranked& mine, int (*counts)[DIGITS], const int* keys, int count, int rows, int shift) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    mine.first = (long long)blockIdx.x * TILE + warp * WARP * ITEMS + lane;
    for (int w = 0; w < WARPS; w++) counts[w][threadIdx.x] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const bool here = mine.first + i * WARP < count;
        mine.key[i] = here ? row_of(keys[mine.first + i * WARP], rows) : rows;
        mine.digit[i] = here ? mine.key[i] >> shift & (DIGITS - 1) : DIGITS;
        const unsigned same = __match_any_sync(ALL_LANES, mine.digit[i]), lower = same & ((1u << lane) - 1);
        const int before = here ? counts[warp][mine.digit[i]] : 0;
        __syncwarp();
        if (here && !lower) counts[warp][mine.digit[i]] = before + __popc(same);
        __syncwarp();
        mine.rank[i] = before + __popc(lower);
    }
    __syncthreads();
}

// count_digits: counts[d,t] = keys of tile t with digit d                                                 [DIGITS,T] <- [N].   Grid: T.
__global__ void __launch_bounds__(BLOCK) count_digits(const int* keys, int* counts, int count, int rows, int shift) {
    __shared__ int of_warps[WARPS][DIGITS];
    Ranked mine;
    rank_in_warps(mine, of_warps, keys, count, rows, shift);
    int total = 0;
    for (int w = 0; w < WARPS; w++) total += of_warps[w][threadIdx.x];
    counts[(long long)threadIdx.x * gridDim.x + blockIdx.x] = total;
}

// scan_counts: counts[d,t] = keys with digit d before tile t, totals[d] = all of them             [DIGITS,T] in place, [DIGITS]
// One warp per digit.   Grid: DIGITS / WARPS.
__global__ void __launch_bounds__(BLOCK) scan_counts(int* counts, int* totals, int tiles) {
    const int lane = threadIdx.x % WARP, digit = blockIdx.x * WARPS + threadIdx.x / WARP;
    int* row = counts + (long long)digit * tiles;
    int before = 0;
    for (int first = 0; first < tiles; first += WARP) {
        const int here = first + lane < tiles ? row[first + lane] : 0;
        const int sum = warp_inclusive(here);
        if (first + lane < tiles) row[first + lane] = before + sum - here;
        before += __shfl_sync(ALL_LANES, sum, WARP - 1);
    }
    if (lane == 0) totals[digit] = before;
}

// place_keys: moves each key, and its entry of `turn` (null: its index), to its sorted position, by the counts of scan_counts.   Grid: T.
__global__ void __launch_bounds__(BLOCK) place_keys(
    const int* keys, const int* turn, const int* counts, const int* totals, int* sorted, int* sorted_turn, int count, int rows, int shift
) {
    __shared__ int places[WARPS][DIGITS], of_warps[WARPS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    Ranked mine;
    rank_in_warps(mine, places, keys, count, rows, shift);
    const int total = totals[threadIdx.x], sum = warp_inclusive(total);  // from here on a thread's digit is its index
    if (lane == WARP - 1) of_warps[warp] = sum;
    __syncthreads();
    int place = sum - total + counts[(long long)threadIdx.x * gridDim.x + blockIdx.x];
    for (int w = 0; w < warp; w++) place += of_warps[w];
    for (int w = 0; w < WARPS; w++) {
        const int here = places[w][threadIdx.x];
        places[w][threadIdx.x] = place;
        place += here;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const long long from = mine.first + i * WARP;
        if (from >= count) continue;
        const int to = places[warp][mine.digit[i]] + mine.rank[i];
        sorted[to] = mine.key[i];
        sorted_turn[to] = turn ? turn[from] : int(from);
    }
}
