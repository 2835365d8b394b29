// Products of tiles of bfloat16 on the tensor cores, for the attention kernels. A block is WARPS warps; a warp has 16 M rows of the block's own
// tile, and keeps their scores with N rows of the other tile in registers: [m][n][i] is row 16m + lane/4 + 8(i/2), column 8n + 2(lane%4) + i%2.
// The left side of the next product has the same layout, so scores never go through memory (Dao 2023).
// Rows in shared memory are W + 8 elements apart: an odd number of 16 bytes, so that the 8 rows of an ldmatrix come from different banks.
#pragma once
#include "attention_copy.cuh"

constexpr int WARPS = 4, THREADS = WARPS * WARP;

template <int W>
constexpr int STRIDE = W + 8;
template <int W, int SIZE, int ARRAYS>
using TileCopy = RowCopy<bf16, W, STRIDE<W>, THREADS, SIZE, ARRAYS>;

// The block's own tile: its sequence, group and first row. It is computed again where it is asked for, and so takes no registers between.
struct Place {
    int b, g, first;

    template <int OWN, bool LAST_FIRST>
    __device__ static Place of_block(int groups, int count) {
        const int block = kept(int(blockIdx.x)), n_tiles = (count + OWN - 1) / OWN, unit = block / n_tiles, tile = block % n_tiles;
        return {unit / groups, unit % groups, (LAST_FIRST ? n_tiles - 1 - tile : tile) * OWN};
    }
};

// Two products with the same left side: one with b[0], b[1] on the right, one with b[2], b[3].
__device__ inline void multiply_pair(float (&left)[4], float (&right)[4], const unsigned (&a)[4], const unsigned (&b)[4]) {
    const unsigned first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
    mma_bf16(left, a, first);
    mma_bf16(right, a, second);
}

// Where this lane reads, in elements from the start of a tile: 16 x 16 of it as they are, or 16 x 16 of its transpose.
template <int W>
__device__ inline int straight_lane() {
    const int lane = threadIdx.x % WARP;
    return lane % 16 * STRIDE<W> + lane / 16 * 8;
}
template <int W>
__device__ inline int transposed_lane() {
    const int lane = threadIdx.x % WARP;
    return (lane % 8 + lane / 16 * 8) * STRIDE<W> + lane / 8 % 2 * 8;
}

// sum += own other^T, both [rows,W] in shared memory: `own` from straight_lane in the warp's first row on, `other` from transposed_lane on.
template <int W, int M, int N>
__device__ inline void multiply_rows(float (&sum)[M][N / 8][4], const bf16* own, const bf16* other) {
#pragma unroll
    for (int c = 0; c < W; c += 16) {
        unsigned a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) ldmatrix_x4(a[m], own + 16 * m * STRIDE<W> + c);
#pragma unroll
        for (int n = 0; n < N / 8; n += 2) {
            unsigned b[4];
            ldmatrix_x4(b, other + 8 * n * STRIDE<W> + c);
#pragma unroll
            for (int m = 0; m < M; m++) multiply_pair(sum[m][n], sum[m][n + 1], a[m], b);
        }
    }
}

// Sums, rounded, as the left side of a product.
template <int M, int N>
__device__ inline void round_scores(unsigned (&a)[M][N / 16][4], const float (&x)[M][N / 8][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N / 16; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) a[m][n][i] = pack_bf16(x[m][2 * n + i / 2][i % 2 * 2], x[m][2 * n + i / 2][i % 2 * 2 + 1]);
}

// sum += a other, a [rows,N] in registers, other [N,W] in shared memory, from straight_lane on.
template <int W, int M, int N>
__device__ inline void multiply_scores(float (&sum)[M][W / 8][4], const unsigned (&a)[M][N / 16][4], const bf16* other) {
#pragma unroll
    for (int n = 0; n < N / 16; n++)
#pragma unroll
        for (int c = 0; c < W / 8; c += 2) {
            unsigned b[4];
            ldmatrix_x4_transposed(b, other + 16 * n * STRIDE<W> + 8 * c);
#pragma unroll
            for (int m = 0; m < M; m++) multiply_pair(sum[m][c], sum[m][c + 1], a[m][n], b);
        }
}

// Sets scores that are not seen to -infinity. own_positions from the warp's first row on. KEYS: the other tile has keys.
template <int M, int N, bool KEYS>
__device__ inline void hide(float (&scores)[M][N / 8][4], const int* own_positions, const int* other_positions, const Sight& sight) {
    const int lane = threadIdx.x % WARP;
    int row[M][2];
    Range seen_by_row[M][2];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            row[m][half] = own_positions[16 * m + lane / 4 + 8 * half];
            seen_by_row[m][half] = sight.range(row[m][half]);
        }
#pragma unroll
    for (int n = 0; n < N / 8; n++) {
        const int2 two = *reinterpret_cast<const int2*>(other_positions + 8 * n + lane % 4 * 2);
        const int column[2] = {two.x, two.y};
        const Range seen_by_column[2] = {sight.range(two.x), sight.range(two.y)};
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int key = KEYS ? column[i % 2] : row[m][i / 2];
                const Range seen = KEYS ? seen_by_row[m][i / 2] : seen_by_column[i % 2];
                if (key < seen.least || key > seen.most) scores[m][n][i] = -infinity();
            }
    }
}

// Stores a warp's 16 M rows of sums, 16 bytes per access, through its own rows of a tile in shared memory.
template <int W, int M>
__device__ inline void store_rows(const float (&sum)[M][W / 8][4], bf16* tile, const Rows<bf16>& rows, int first) {
    constexpr int PIECES = W / 8;
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int c = 0; c < W / 8; c++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                bf16* to = tile + (16 * m + lane / 4 + 8 * half) * STRIDE<W> + 8 * c + lane % 4 * 2;
                *reinterpret_cast<unsigned*>(to) = pack_bf16(sum[m][c][2 * half], sum[m][c][2 * half + 1]);
            }
    __syncwarp();
    for (int i = lane; i < 16 * M * PIECES; i += WARP) {
        const int row = i / PIECES, c = i % PIECES * 8;
        if (first + row < rows.count && c < rows.width)
            store_16(rows.at(first + row) + c, *reinterpret_cast<const uint4*>(tile + row * STRIDE<W> + c));
    }
}
