// Philox-4x32-10 (Salmon et al. 2011), a cipher of a counter: (element / 4, stream, micro-batch, step) under the 64-bit seed gives four words,
// of which element i takes the (i % 4)-th. uniform = (bits >> 8) * 2^-24. Reference: minimoe/reference/random.py; the bits are the same.
// About 100 integer instructions for four numbers, 20 of them 64-bit products.
#pragma once
#include "common.cuh"

constexpr int WORDS = 4;  // random words of one counter

// The key of a random array. A step or micro-batch that is on the device, as an integer of 4 or 8 bytes, is read there (its low word).
struct Draw {
    unsigned seed_low, seed_high, stream, micro, step;
};

__device__ inline Draw make_draw(
    unsigned seed_low, unsigned seed_high, unsigned stream, const unsigned* micro_at, unsigned micro, const unsigned* step_at, unsigned step
) {
    return {seed_low, seed_high, stream, micro_at ? *micro_at : micro, step_at ? *step_at : step};
}

__device__ inline uint4 philox(unsigned counter, const Draw& draw) {
    unsigned c0 = counter, c1 = draw.stream, c2 = draw.micro, c3 = draw.step, k0 = draw.seed_low, k1 = draw.seed_high;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const unsigned long long product0 = 0xD2511F53ull * c0, product1 = 0xCD9E8D57ull * c2;
        c0 = unsigned(product1 >> 32) ^ c1 ^ k0;
        c1 = unsigned(product1);
        c2 = unsigned(product0 >> 32) ^ c3 ^ k1;
        c3 = unsigned(product0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
}

__device__ inline float uniform_of(unsigned bits) { return float(bits >> 8) * 5.9604644775390625e-8f; }  // exact: 24 bits, 2^-24

// The uniforms of the elements 4 * counter .. 4 * counter + 3.
__device__ inline void uniforms(unsigned counter, const Draw& draw, float (&u)[WORDS]) {
    const uint4 words = philox(counter, draw);
    u[0] = uniform_of(words.x);
    u[1] = uniform_of(words.y);
    u[2] = uniform_of(words.z);
    u[3] = uniform_of(words.w);
}
