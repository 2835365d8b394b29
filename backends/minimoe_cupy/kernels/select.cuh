// Finds the largest numbers of a row that a warp holds in registers, one after the other: gates, top_k and noisy_load choose experts with it.
// Column c of a row is element j of lane l:  c = (j / V * 32 + l) * V + j % V,  so V neighbours are one access and a warp's accesses are
// coalesced. PER_LANE elements per lane: rows of up to 32 * PER_LANE. With V = 4 the length of a row is a multiple of 4.
// Numbers are compared as integers that order as they do: ties go to the lowest column, NaN comes last, and columns are always in range.
//
// One call of take_best, with a tie: PER_LANE = 1, so lane l holds column (expert) l. Experts 3 and 18 both have the logit 2.5, all others less.
//
//   1. warp_largest: a butterfly. At each offset, lane l keeps the larger of its key and that of lane l ^ offset. # marks lanes with key_of(2.5).
//
//       lane        0       8       16      24     31
//       start       ...#..............#.............
//       offset 16   ..##..............##............
//       offset 8    ..##......##......##......##....
//       offset 4    ..##..##..##..##..##..##..##..##
//       offset 2    ################################
//       offset 1    ################################      every lane knows the largest key, but not whose it is
//
//   2. warp_smallest: lanes whose own key equals it offer their column, the others NO_COLUMN (.). The same butterfly with minima; a = 3, b = 18.
//
//       start       ...a..............b.............
//       offset 16   ..ba..............ba............
//       offset 8    ..ba......ba......ba......ba....
//       offset 4    ..ba..ba..ba..ba..ba..ba..ba..ba
//       offset 2    babababababababababababababababa
//       offset 1    aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa      the lower expert, 3, wins in every lane
//
//   3. Lane 3 marks its key as TAKEN. The next call finds 2.5 again, now only at 18: the top 2 are experts 3 and 18, in this order.
//
// Integer maxima and minima have no rounding, so no order of lanes can change the choice. On a card each butterfly is one instruction.
#pragma once
#include "common.cuh"

constexpr int TAKEN = -2147483647 - 1;  // below every number: chosen before, or past the row's end
constexpr int NAN_KEY = TAKEN + 1;
constexpr int NO_COLUMN = 2147483647;

// An integer that orders as x does, with equal zeros and NaN below everything else; and back.
__device__ inline int key_of(float x) {
    const int bits = __float_as_int(x);
    const int key = x == 0.0f ? 0 : bits ^ (bits >> 31 & 0x7fffffff);
    return x == x ? key : NAN_KEY;
}
__device__ inline float value_of(int key) { return key == NAN_KEY ? nan() : __int_as_float(key ^ (key >> 31 & 0x7fffffff)); }

// The same order in unsigned integers, which a radix takes digit by digit.
__device__ inline unsigned unsigned_key(float x) { return unsigned(key_of(x)) ^ 0x80000000u; }

// One instruction each, from sm_80 on.
__device__ inline int warp_largest(int value) { return __reduce_max_sync(ALL_LANES, value); }
__device__ inline int warp_smallest(int value) { return __reduce_min_sync(ALL_LANES, value); }

// The column of element j of lane 0; that of lane l is l * V further.
template <int V>
__device__ constexpr int column_of(int j) {
    return j / V * WARP * V + j % V;
}

// Elements past the row's end become `filler`.
template <int V, int PER_LANE>
__device__ inline void load_row(const float* row, int n, float filler, float (&to)[PER_LANE], int lane) {
#pragma unroll
    for (int j = 0; j < PER_LANE; j += V) {
        float part[V];
#pragma unroll
        for (int i = 0; i < V; i++) part[i] = filler;
        if (lane * V + column_of<V>(j) < n) load(row + lane * V + column_of<V>(j), part);
#pragma unroll
        for (int i = 0; i < V; i++) to[j + i] = part[i];
    }
}

template <int V, int PER_LANE>
__device__ inline void store_row(float* row, int n, const float (&from)[PER_LANE], int lane) {
#pragma unroll
    for (int j = 0; j < PER_LANE; j += V) {
        float part[V];
#pragma unroll
        for (int i = 0; i < V; i++) part[i] = from[j + i];
        if (lane * V + column_of<V>(j) < n) store(row + lane * V + column_of<V>(j), part);
    }
}

template <int V, int PER_LANE>
__device__ inline void write_keys(const float (&values)[PER_LANE], int n, int (&keys)[PER_LANE], int lane) {
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) keys[j] = lane * V + column_of<V>(j / V * V) < n ? key_of(values[j]) : TAKEN;
}

// Returns the column of the largest key, the lowest of equal ones, and marks it as taken; `top` becomes the key. All lanes get the same.
template <int V, int PER_LANE>
__device__ inline int take_best(int (&keys)[PER_LANE], int& top, int lane) {
    int best = keys[0];
#pragma unroll
    for (int j = 1; j < PER_LANE; j++) best = max(best, keys[j]);
    top = warp_largest(best);
    int mine = NO_COLUMN;
#pragma unroll
    for (int j = PER_LANE - 1; j >= 0; j--) mine = keys[j] == top ? column_of<V>(j) : mine;
    const int column = warp_smallest(mine == NO_COLUMN ? NO_COLUMN : mine + lane * V);
    const int here = column - lane * V;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) keys[j] = here == column_of<V>(j) ? TAKEN : keys[j];
    return column;
}

// Sums a row over the warps, in order, into shared memory `sums` [n]. All threads of the block call this.
template <int WARPS, int V, int PER_LANE>
__device__ inline void add_over_warps(const float (&mine)[PER_LANE], int n, float* sums) {
    const int lane = threadIdx.x % WARP;
    for (int warp = 0; warp < WARPS; warp++) {
        if (int(threadIdx.x / WARP) == warp) {
#pragma unroll
            for (int j = 0; j < PER_LANE; j++) {
                const int column = lane * V + column_of<V>(j);
                if (column < n) sums[column] = (warp ? sums[column] : 0.0f) + mine[j];
            }
        }
        __syncthreads();
    }
}
