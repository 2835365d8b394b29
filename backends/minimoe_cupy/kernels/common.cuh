// What all kernels share: bfloat16 as 16 bits that are widened to float, accesses of 16 bytes, sums and maxima over a warp.
// The launch shape fixes the order of every sum: equal inputs give equal bits.
#pragma once
#include "ptx.cuh"

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int WARP = 32;

struct alignas(2) bf16 {
    unsigned short bits;
};
constexpr int CHUNK = 8;  // bf16 in 16 bytes

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float(unsigned(x.bits) << 16); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
    return x;
}
template <>
__device__ inline bf16 from_float<bf16>(float x) {
    return {round_to_bf16(x)};
}

// The i-th word of 4 bytes as one float, or two bf16, the first in the low half; and back.
template <int V>
__device__ inline void unpack(unsigned word, float (&to)[V], int i, const float*) {
    to[i] = __uint_as_float(word);
}
template <int V>
__device__ inline void unpack(unsigned word, float (&to)[V], int i, const bf16*) {
    to[2 * i] = __uint_as_float(word << 16);
    to[2 * i + 1] = __uint_as_float(word & 0xffff0000u);
}
template <int V>
__device__ inline unsigned pack(const float (&from)[V], int i, const float*) {
    return __float_as_uint(from[i]);
}
template <int V>
__device__ inline unsigned pack(const float (&from)[V], int i, const bf16*) {
    return pack_bf16(from[2 * i], from[2 * i + 1]);
}

__device__ inline float infinity() { return __uint_as_float(0x7f800000u); }
__device__ inline float nan() { return __uint_as_float(0x7fc00000u); }

// V neighbours of global memory in one access: V is 1, or as many as 16 bytes hold.
template <int V, class T>
__device__ inline void load(const T* from, float (&to)[V]) {
    if constexpr (V == 1) {
        to[0] = to_float(*from);
    } else {
        const uint4 words = *reinterpret_cast<const uint4*>(from);
        unpack(words.x, to, 0, from);
        unpack(words.y, to, 1, from);
        unpack(words.z, to, 2, from);
        unpack(words.w, to, 3, from);
    }
}

template <int V, class T>
__device__ inline void store(T* to, const float (&from)[V]) {
    if constexpr (V == 1) {
        *to = from_float<T>(from[0]);
    } else {
        store_16(to, make_uint4(pack(from, 0, to), pack(from, 1, to), pack(from, 2, to), pack(from, 3, to)));
    }
}

// V float sums, 16 bytes at a time: V is 1 or a multiple of 4.
template <int V>
__device__ inline void load_sums(const float* from, float (&to)[V]) {
    constexpr int PART = V < 4 ? V : 4;
#pragma unroll
    for (int i = 0; i < V; i += PART) {
        float part[PART];
        load(from + i, part);
#pragma unroll
        for (int j = 0; j < PART; j++) to[i + j] = part[j];
    }
}
template <int V>
__device__ inline void store_sums(float* to, const float (&from)[V]) {
    constexpr int PART = V < 4 ? V : 4;
#pragma unroll
    for (int i = 0; i < V; i += PART) {
        float part[PART];
#pragma unroll
        for (int j = 0; j < PART; j++) part[j] = from[i + j];
        store(to + i, part);
    }
}

__device__ inline float warp_sum(float value) {
#pragma unroll
    for (int offset = WARP / 2; offset; offset /= 2) value += __shfl_xor_sync(ALL_LANES, value, offset);
    return value;
}

__device__ inline float warp_max(float value) {
#pragma unroll
    for (int offset = WARP / 2; offset; offset /= 2) value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, offset));
    return value;
}
