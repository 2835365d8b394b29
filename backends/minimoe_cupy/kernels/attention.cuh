// What the attention kernels share: where rows and positions are, which keys a query sees, and which tiles can be skipped.
//
// The S = Q/G query heads that read one key/value head form one group of rows: row i of the group is head i % S of token i / S. So a tile of
// rows loads its keys once for all S heads, and a key's gradient is summed over them in the order of the rows.
// A block owns one tile (of rows or of keys) and visits tiles of the other kind. Positions come in any order, so a tile is skipped only if the
// minimum and maximum of its positions say that no query sees any of its keys. The block checks 32 tiles at a time.
#pragma once
#include "common.cuh"

constexpr int NEVER = 0x7fffffff;  // the position of a key that no query sees
constexpr int LOWEST = -NEVER - 1;
constexpr int TILES = WARP;  // checked at a time, one per lane
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// The offset of a row's softmax is added to its scores, in base 2. A weight is at most 2^SLACK: a score that exceeds that gives a new offset. A
// row begins with NO_OFFSET, which is too much for every score but a hidden one: the weight of -infinity is 0.
constexpr float SLACK = 8.0f, NO_OFFSET = 3.402823466e38f;

// i / S as a product: `inverse` is ceil(2^32 / S), or 0 if S is 1. Exact while Tq S^2 < 2^32.
__device__ inline int token_of(int row, unsigned inverse) { return inverse ? int(__umulhi(unsigned(row), inverse)) : row; }

// The rows of one sequence and group in an array [B,T,heads,width].
template <class T>
struct Rows {
    T* first;
    long long step;  // elements from one token to the next
    int width, heads;
    unsigned inverse;
    int count;

    __device__ T* at(int row) const {
        const int token = token_of(row, inverse);
        return first + token * step + (row - token * heads) * width;
    }
};

struct Sizes {
    int groups, heads;  // G, S
    unsigned inverse;
    int n_q, n_k;

    template <class T>
    __device__ Rows<T> queries(T* array, int width, int b, int g) const {
        const int step = groups * heads * width;
        return {array + (long long)b * n_q * step + g * heads * width, step, width, heads, inverse, n_q * heads};
    }
    template <class T>
    __device__ Rows<T> keys(T* array, int width, int b, int g) const {
        const int step = groups * width;
        return {array + (long long)b * n_k * step + g * width, step, width, 1, 0, n_k};
    }
    // The index of a row in an array [B,Q,Tq].
    __device__ long long statistic(int b, int g, int row) const {
        const int token = token_of(row, inverse);
        return ((long long)(b * groups + g) * heads + row - token * heads) * n_q + token;
    }
};

// The positions of the rows, or keys, of a sequence: NEVER for keys that are not valid and past the last one.
struct Positions {
    const int* of_token;
    const bool* valid;
    int count;
    unsigned inverse;

    __device__ int operator()(int i) const {
        if (i >= count || (valid && !valid[i])) return NEVER;
        return of_token[token_of(i, inverse)];
    }
};

struct Range {
    int least, most;
};

// Which positions a query sees: those from lowest(its own) to highest(its own), none of which is NEVER.
struct Sight {
    bool causal;
    int window;

    __device__ int lowest(int query) const { return window > 0 ? int(max((long long)query - window + 1, (long long)LOWEST)) : LOWEST; }
    __device__ int highest(int query) const {
        if (causal) return query;
        return window > 0 ? int(min((long long)query + window - 1, (long long)NEVER - 1)) : NEVER - 1;
    }
    __device__ Range range(int query) const { return {lowest(query), highest(query)}; }
    __device__ bool sees(int query, int key) const { return lowest(query) <= key && key <= highest(query); }
    __device__ bool sees_any(Range queries, Range keys) const {
        return keys.least <= highest(queries.most) && keys.most >= lowest(queries.least);
    }
    __device__ bool sees_all(Range queries, Range keys) const {
        return keys.most <= highest(queries.least) && keys.least >= lowest(queries.most);
    }
};

// Extends a range by a position. A hidden key makes `most` NEVER, so that its tile still gets a mask; a row past the last changes nothing.
template <bool KEYS>
__device__ inline void extend(Range& range, int position) {
    range.least = min(range.least, position);
    if (KEYS || position != NEVER) range.most = max(range.most, position);
}

template <int LANES>
__device__ inline Range join(Range range) {
#pragma unroll
    for (int offset = LANES / 2; offset; offset /= 2) {
        range.least = min(range.least, __shfl_xor_sync(ALL_LANES, range.least, offset));
        range.most = max(range.most, __shfl_xor_sync(ALL_LANES, range.most, offset));
    }
    return range;
}

// The range of a block's own tile, in every thread; its positions go to shared memory, to be read after the next barrier.
template <int SIZE, bool KEYS>
__device__ inline Range look_at_own(const Positions& positions, int first, int* shared) {
    Range range = {NEVER, LOWEST};
    for (int i = threadIdx.x % WARP; i < SIZE; i += WARP) {
        const int position = positions(first + i);
        if (threadIdx.x < WARP) shared[i] = position;
        extend<KEYS>(range, position);
    }
    return join<WARP>(range);
}

// One bit per tile. due: it must be visited; clear: every query sees every key, so that it needs no mask.
struct Visits {
    unsigned due, clear;
};

// The tiles from `first` on, of SIZE positions each; KEYS: of keys, for a block of queries. Their positions stay in shared[TILES * SIZE],
// followed by two numbers per tile. All threads of the block call this.
template <int SIZE, int THREADS, bool KEYS>
__device__ inline Visits look_ahead(const Positions& positions, int first, int* shared, Range own, const Sight& sight) {
    constexpr int LANES = THREADS / TILES;
    int* least = shared + TILES * SIZE;
    int* most = least + TILES;
    const int mine = threadIdx.x / LANES, part = threadIdx.x % LANES;
    Range range = {NEVER, LOWEST};
    __syncthreads();  // no thread reads the previous tiles any more
#pragma unroll 8
    for (int i = part; i < SIZE; i += LANES) {
        const int position = positions((first + mine) * SIZE + i);
        shared[mine * SIZE + i] = position;
        extend<KEYS>(range, position);
    }
    range = join<LANES>(range);
    if (part == 0) {
        least[mine] = range.least;
        most[mine] = range.most;
    }
    __syncthreads();
    const int lane = threadIdx.x % WARP;
    const Range tile = {least[lane], most[lane]};
    const Range queries = KEYS ? own : tile, keys = KEYS ? tile : own;
    const bool exists = (first + lane) * SIZE < positions.count;
    return {
        __ballot_sync(ALL_LANES, exists && sight.sees_any(queries, keys)), __ballot_sync(ALL_LANES, exists && sight.sees_all(queries, keys))
    };
}
