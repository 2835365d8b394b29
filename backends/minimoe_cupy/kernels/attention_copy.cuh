// Copies of tiles of rows from global to shared memory, in the background, for the attention kernels.
#pragma once
#include "attention.cuh"

// One thread's part in copying tiles of SIZE rows up to W wide, which lie STRIDE elements apart, from ARRAYS arrays with the same rows, one
// tile behind the other. LANES threads copy 16 bytes each of a row, side by side, of every EACH-th row. What is the same for all tiles is
// computed once. Past the last row that row is copied again, for the positions hide it, and columns past the width are left alone: clear()
// writes zeros there once.
template <class T, int W, int STRIDE, int THREADS, int SIZE, int ARRAYS>
struct RowCopy {
    static constexpr int PIECE = 16 / sizeof(T), LANES = W / PIECE % 8 ? 4 : 8, EACH = THREADS / LANES, PASSES = SIZE / EACH;
    const char* first[ARRAYS];                 // row 0, from the thread's column on
    int row_step[ARRAYS], token_step[ARRAYS];  // bytes: row i is at row_step i + token_step (i / heads)
    int width[ARRAYS];                         // from the thread's column on
    unsigned inverse;
    int last, place;  // the last row; bytes from the start of a tile to the thread's place in it

    __device__ explicit RowCopy(const Rows<const T> (&rows)[ARRAYS]) : inverse(rows[0].inverse), last(rows[0].count - 1) {
        const int column = threadIdx.x % LANES * PIECE;
#pragma unroll
        for (int a = 0; a < ARRAYS; a++) {
            const int step = int(rows[a].step);
            first[a] = kept(reinterpret_cast<const char*>(rows[a].first + column));
            row_step[a] = kept(int(sizeof(T)) * (inverse ? rows[a].width : step));
            token_step[a] = kept(int(sizeof(T)) * (step - rows[a].heads * rows[a].width));
            width[a] = rows[a].width - column;
        }
        place = kept(int(sizeof(T)) * (int(threadIdx.x) / LANES * STRIDE + column));
    }

    // Where the thread's part of the i-th pass goes, c columns on.
    __device__ char* to(T* tile, int a, int i, int c) const {
        return reinterpret_cast<char*>(tile + (a * SIZE + i * EACH) * STRIDE + c) + place;
    }

    // Copies the rows from `first_row` on.
    __device__ void operator()(T* tile, int first_row) const {
        const char* from[ARRAYS][PASSES];
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            const int row = min(first_row + int(threadIdx.x) / LANES + i * EACH, last);
#pragma unroll
            for (int a = 0; a < ARRAYS; a++) {  // kept: so that each product is one of two 32-bit numbers
                from[a][i] = first[a] + (long long)kept(row) * kept(row_step[a]);
                if (inverse) from[a][i] += (long long)kept(token_of(row, inverse)) * kept(token_step[a]);
            }
        }
#pragma unroll
        for (int a = 0; a < ARRAYS; a++)
#pragma unroll
            for (int c = 0; c < W; c += PIECE * LANES)
                if (c < width[a]) {
#pragma unroll
                    for (int i = 0; i < PASSES; i++) copy_async(to(tile, a, i, c), from[a][i] + c * int(sizeof(T)), true);
                }
    }

    __device__ void clear(T* tile) const {
#pragma unroll
        for (int a = 0; a < ARRAYS; a++)
            for (int c = 0; c < W; c += PIECE * LANES)
                for (int i = 0; i < PASSES && c >= width[a]; i++) *reinterpret_cast<uint4*>(to(tile, a, i, c)) = make_uint4(0, 0, 0, 0);
    }
};
