// Sums that are in shared memory row by row, finished and stored: as bfloat16 in chunks of 8 columns, as float32 in chunks of 4 (16 bytes).
#pragma once
#include "grouped_finish.cuh"

constexpr int QUAD = 4;  // float32 in 16 bytes
constexpr int PAD = 8;  // floats between rows of sums in shared memory: four rows' 32 bytes in different banks

__device__ inline void read_chunk(const float* sums, int chunk, float (&to)[CHUNK]) {
    const float4 low = reinterpret_cast<const float4*>(sums)[2 * chunk], high = reinterpret_cast<const float4*>(sums)[2 * chunk + 1];
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}

// Applies PRODUCT to a chunk of a row's sums; the other half for swiglu is chunk `up`.
template <bool VECTOR, int PRODUCT>
__device__ inline void finish_chunk(const Finish<bf16>& finish, int row, int column, const float* sums, int chunk, int up) {
    float values[CHUNK], others[CHUNK];
    read_chunk(sums, chunk, values);
    if constexpr (PRODUCT == ACTIVATE) {
        if (finish.kind == SWIGLU) read_chunk(sums, up, others);
        finish_activate<VECTOR>(finish, row, column, values, others);
    } else if constexpr (PRODUCT == BACKWARD) {
        finish_backward<VECTOR>(finish, row, column, values);
    } else {
        finish_plain<VECTOR>(finish, row, column, values);
    }
}

// Stores 4 sums of a weight's gradient, or adds them to memory, in float32: they are added over many micro-batches. `count` elements of the
// row are left.
template <bool VECTOR>
__device__ inline void store_quad(float* to, const float* sums, int quad, int count, bool accumulate) {
    const float4 four = reinterpret_cast<const float4*>(sums)[quad];
    float values[QUAD] = {four.x, four.y, four.z, four.w};
    if (accumulate) add_some<VECTOR>(to, values, count);
    store_some<VECTOR>(to, values, count);
}
