// Products of tiles of float32 on the ordinary multipliers, for the attention kernels. A block is 16 x 8 threads; a thread has ROWS rows of the
// block's own tile and sums of N/8 rows of the other one, every eighth: scores[i][j] is row ROWS y + i with row x + 8 j.
// Scores go through shared memory to become the left side of the next product; a row of them is read by the warp that wrote it.
// Rows in shared memory are W + 4 elements apart: an odd number of 16 bytes, so that 8 rows read side by side come from different banks.
// `vector`: rows in global memory begin at multiples of 16 bytes and are copied in the background; else element by element.
#pragma once
#include "attention_copy.cuh"

constexpr int TX = 8, TY = 16, THREADS = TX * TY, ROWS = 4, OWN = ROWS * TY, QUAD = 4;

template <int W>
constexpr int STRIDE = W + QUAD;

// Where a thread's own rows begin in a tile, and the first of those that it reads of the other one.
__device__ inline int own_row() { return threadIdx.x / TX * ROWS; }
__device__ inline int other_row() { return threadIdx.x % TX; }

__device__ inline void read_quad(float (&to)[QUAD], const float* shared) {
    const float4 four = *reinterpret_cast<const float4*>(shared);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

// SIZE rows from `first` on into shared memory, element by element; zeros past the last row and past the width.
template <int W, int SIZE>
__device__ inline void copy_elements(float* tile, const Rows<const float>& rows, int first) {
#pragma unroll 1
    for (int i = threadIdx.x; i < SIZE * W; i += THREADS) {
        const int row = i / W, c = i % W;
        const bool wanted = first + row < rows.count && c < rows.width;
        tile[row * STRIDE<W> + c] = wanted ? rows.at(first + row)[c] : 0.0f;
    }
}

// Copies of tiles of SIZE rows: 16 bytes at a time in the background if `vector`, else element by element.
template <int W, int SIZE>
struct TileCopy {
    RowCopy<float, W, STRIDE<W>, THREADS, SIZE, 1> pieces;
    Rows<const float> rows;
    bool vector;

    __device__ TileCopy(const Rows<const float>& rows, bool vector) : pieces({rows}), rows(rows), vector(vector) {}
    __device__ void operator()(float* tile, int first) const {
        if (vector) pieces(tile, first);
        else copy_elements<W, SIZE>(tile, rows, first);
    }
    // Before the first copy into a tile: zeros past the width, which copies of pieces leave alone.
    __device__ void clear(float* tile) const {
        if (vector) pieces.clear(tile);
    }
};

// sum += own other^T, both [rows,W] in shared memory, from the thread's first row of either on.
template <int W, int COLUMNS>
__device__ inline void multiply_rows(float (&sum)[ROWS][COLUMNS], const float* own, const float* other) {
#pragma unroll 2
    for (int c = 0; c < W; c += QUAD) {
        float a[ROWS][QUAD];
#pragma unroll
        for (int i = 0; i < ROWS; i++) read_quad(a[i], own + i * STRIDE<W> + c);
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            float b[QUAD];
            read_quad(b, other + TX * j * STRIDE<W> + c);
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int e = 0; e < QUAD; e++) sum[i][j] = fmaf(a[i][e], b[e], sum[i][j]);
        }
    }
}

// Scores to shared memory, [OWN][N + 4], for the threads of their rows. `left`: the thread's first row.
template <int COLUMNS>
__device__ inline void put_scores(float* left, const float (&scores)[ROWS][COLUMNS]) {
    __syncwarp();  // the previous scores have been read
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) left[i * (TX * COLUMNS + QUAD) + other_row() + TX * j] = scores[i][j];
    __syncwarp();
}

// sum += left other, left [rows,N] and other [N,W] in shared memory. sum[i][4h + e] is column 32 h + 4 x + e.
template <int W, int N>
__device__ inline void multiply_scores(float (&sum)[ROWS][W / TX], const float* left, const float* other) {
    other += threadIdx.x % TX * QUAD;
#pragma unroll 1
    for (int n = 0; n < N; n += QUAD) {
        float a[ROWS][QUAD];
#pragma unroll
        for (int i = 0; i < ROWS; i++) read_quad(a[i], left + i * (N + QUAD) + n);
#pragma unroll
        for (int e = 0; e < QUAD; e++)
#pragma unroll
            for (int h = 0; h < W / WARP; h++) {
                float b[QUAD];
                read_quad(b, other + (n + e) * STRIDE<W> + h * WARP);
#pragma unroll
                for (int i = 0; i < ROWS; i++)
#pragma unroll
                    for (int f = 0; f < QUAD; f++) sum[i][QUAD * h + f] = fmaf(a[i][e], b[f], sum[i][QUAD * h + f]);
            }
    }
}

// Sets scores that are not seen to -infinity. Positions from the thread's first row of either tile on. KEYS: the other tile has keys.
template <bool KEYS, int COLUMNS>
__device__ inline void hide(float (&scores)[ROWS][COLUMNS], const int* own_positions, const int* other_positions, const Sight& sight) {
    Range seen_by_row[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) seen_by_row[i] = sight.range(own_positions[i]);
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
        const int column = other_positions[TX * j];
        const Range seen_by_column = sight.range(column);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int key = KEYS ? column : own_positions[i];
            const Range seen = KEYS ? seen_by_row[i] : seen_by_column;
            if (key < seen.least || key > seen.most) scores[i][j] = -infinity();
        }
    }
}

// Stores a thread's rows of sums.
template <int W>
__device__ inline void store_rows(const float (&sum)[ROWS][W / TX], const Rows<float>& rows, int first, bool vector) {
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        if (first + i >= rows.count) continue;
        float* to = rows.at(first + i);
#pragma unroll
        for (int h = 0; h < W / WARP; h++) {
            const int c = h * WARP + threadIdx.x % TX * QUAD;
            float values[QUAD];
#pragma unroll
            for (int f = 0; f < QUAD; f++) {
                values[f] = sum[i][QUAD * h + f];
                if (!vector && c + f < rows.width) to[c + f] = values[f];
            }
            if (vector && c < rows.width) store(to + c, values);
        }
    }
}
