// Products of tiles of bfloat16 on the tensor cores, for the attention kernels. A block is WARPS warps; a warp has 16 M rows of the block's own
// tile, and keeps their scores with N rows of the other tile in registers: [m][n][i] is row 16m + lane/4 + 8(i/2), column 8n + 2(lane%4) + i%2.
// The left side of the next product has the same layout, so scores never go through memory (Dao 2023).
// Rows in shared memory are W + 8 elements apart: an odd number of 16 bytes, so that the 8 rows of an ldmatrix come from different banks.
#pragma once
#include "attention.cuh"

constexpr int WARPS = 4, THREADS = WARPS * WARP;

template <int W>
constexpr int STRIDE = W + 8;

// Two products with the same left side: one with b[0], b[1] on the right, one with b[2], b[3].
__device__ inline void multiply_pair(float (&left)[4], float (&right)[4], const unsigned (&a)[4], const unsigned (&b)[4]) {
    const unsigned first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
    mma_bf16(left, a, first);
    mma_bf16(right, a, second);
}

// sum += own other^T, both [rows,W] in shared memory, `own` from the warp's first row on.
template <int W, int M, int N>
__device__ inline void multiply_rows(float (&sum)[M][N / 8][4], const bf16* own, const bf16* other) {
    const int lane = threadIdx.x % WARP;
    own += lane % 16 * STRIDE<W> + lane / 16 * 8;
    other += (lane % 8 + lane / 16 * 8) * STRIDE<W> + lane / 8 % 2 * 8;
#pragma unroll 2
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

// sum += a other, a [rows,N] in registers, other [N,W] in shared memory.
template <int W, int M, int N>
__device__ inline void multiply_scores(float (&sum)[M][W / 8][4], const unsigned (&a)[M][N / 16][4], const bf16* other) {
    const int lane = threadIdx.x % WARP;
    other += lane % 16 * STRIDE<W> + lane / 16 * 8;
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
#pragma unroll
    for (int n = 0; n < N / 8; n++) {
        const int2 columns = *reinterpret_cast<const int2*>(other_positions + 8 * n + lane % 4 * 2);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = own_positions[16 * m + lane / 4 + i / 2 * 8], column = i % 2 ? columns.y : columns.x;
                if (!(KEYS ? sight.sees(row, column) : sight.sees(column, row))) scores[m][n][i] = -infinity();
            }
    }
}

// SIZE rows from `first` on into shared memory, in the background; zeros past the last row and past the width.
template <int W, int SIZE>
__device__ inline void copy_rows(bf16* tile, const Rows<const bf16>& rows, int first) {
    constexpr int PIECES = W / 8;
#pragma unroll 1
    for (int i = threadIdx.x; i < SIZE * PIECES; i += THREADS) {
        const int row = i / PIECES, c = i % PIECES * 8;
        const bool wanted = first + row < rows.count && c < rows.width;
        copy_async(tile + row * STRIDE<W> + c, wanted ? rows.at(first + row) + c : rows.first, wanted);
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
