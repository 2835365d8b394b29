// Finds which part of a grouped product a block computes, on the device: the host never reads `offsets`.
//
// The grid is sized for the worst case, `row_tiles` = (R + min(E, R) (HEIGHT - 1)) / HEIGHT (one more for unused rows) by `column_tiles`, and
// blocks beyond the last tile return at once. Every warp finds its block's tile by itself: it counts the tiles of all experts, ceil(E / 32)
// experts per lane, and then searches those of one lane. That waits for the cache twice, where a table of tiles would wait once but need a
// launch of its own; and it needs no barrier.
#pragma once
#include "scan.cuh"

struct Tile {
    int expert;  // E: unused rows, which become zeros; -1: nothing to do
    int first, last;  // rows
};

template <int HEIGHT>
__device__ inline int tiles_of(const int* offsets, int expert) {
    return (offsets[expert + 1] - offsets[expert] + HEIGHT - 1) / HEIGHT;
}

// The tile with that index, counted expert by expert; `rows` R includes those at or past offsets[E], 0 leaves them out.
template <int HEIGHT>
__device__ inline Tile find_tile(const int* offsets, int n_experts, int rows, int index) {
    const int lane = threadIdx.x % WARP, share = (n_experts + WARP - 1) / WARP;
    const int begin = min(n_experts, lane * share), end = min(n_experts, begin + share);
    int count = 0;
    for (int e = begin; e < end; e++) count += tiles_of<HEIGHT>(offsets, e);
    int sum = warp_inclusive(count);
    unsigned past = __ballot_sync(ALL_LANES, index < sum);
    if (!past) {
        const int first = offsets[n_experts] + (index - __shfl_sync(ALL_LANES, sum, WARP - 1)) * HEIGHT;
        return {first < rows ? n_experts : -1, first, min(first + HEIGHT, rows)};
    }
    int owner = __ffs(past) - 1;
    index -= __shfl_sync(ALL_LANES, sum - count, owner);
    int expert = owner * share;
    if (share > 1) {
        for (;; expert += WARP) {  // all lanes loop equally often: the tile exists
            const int e = min(expert + lane, n_experts - 1);
            count = lane < n_experts - expert ? tiles_of<HEIGHT>(offsets, e) : 0;
            sum = warp_inclusive(count);
            past = __ballot_sync(ALL_LANES, index < sum);
            if (past) break;
            index -= __shfl_sync(ALL_LANES, sum, WARP - 1);
        }
        owner = __ffs(past) - 1;
        index -= __shfl_sync(ALL_LANES, sum - count, owner);
        expert += owner;
    }
    const int first = offsets[expert] + index * HEIGHT;
    return {expert, first, min(first + HEIGHT, offsets[expert + 1])};
}

struct TileIndex {
    int row, column;
};

// Blocks that run at the same time share rows and weights in L2: they go down BAND tiles before they go right.
constexpr int BAND = 8;

__device__ inline TileIndex tile_index(int block, int row_tiles, int column_tiles) {
    const int band = block / (BAND * column_tiles), within = block - band * BAND * column_tiles;
    const int height = min(BAND, row_tiles - band * BAND);
    return {band * BAND + within % height, within / height};
}
