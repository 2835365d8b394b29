// The arithmetic of a warp's matrices: 16 rows by N columns, summed over 8 or 16 products.
//
// A vector has the 16 rows of one column. A fragment of 16-bit elements is 32 words, one per lane: 8 rows of 8 elements, in order; so is a
// matrix that ldmatrix loads. A fragment of sums holds every other column of 8, likewise: four vectors of 16 rows, interleaved, are two
// fragments.
//
// Products of two bf16, f16 or tf32 are exact in float. They are summed in float in the order of k, and their sum is added to the old one:
// a card keeps more bits within a product, in an order that is its own. So results are equal from run to run, and close to a card's.
#pragma once
#include <cstdint>
#include <cstring>

namespace ptx {

typedef float Column __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

enum class Element { BF16, F16, TF32 };

// Four vectors to one of 64 elements: the first of each, the second of each, ...
inline void interleave(const Words (&in)[4], Words (&out)[4]) {
    constexpr Words LOW = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    constexpr Words HIGH = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const Words even_low = __builtin_shuffle(in[0], in[2], LOW), even_high = __builtin_shuffle(in[0], in[2], HIGH);
    const Words odd_low = __builtin_shuffle(in[1], in[3], LOW), odd_high = __builtin_shuffle(in[1], in[3], HIGH);
    out[0] = __builtin_shuffle(even_low, odd_low, LOW);
    out[1] = __builtin_shuffle(even_low, odd_low, HIGH);
    out[2] = __builtin_shuffle(even_high, odd_high, LOW);
    out[3] = __builtin_shuffle(even_high, odd_high, HIGH);
}

// And back.
inline void separate(const Words (&in)[4], Words (&out)[4]) {
    constexpr Words EVEN = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    constexpr Words ODD = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    const Words even_low = __builtin_shuffle(in[0], in[1], EVEN), even_high = __builtin_shuffle(in[2], in[3], EVEN);
    const Words odd_low = __builtin_shuffle(in[0], in[1], ODD), odd_high = __builtin_shuffle(in[2], in[3], ODD);
    out[0] = __builtin_shuffle(even_low, even_high, EVEN);
    out[2] = __builtin_shuffle(even_low, even_high, ODD);
    out[1] = __builtin_shuffle(odd_low, odd_high, EVEN);
    out[3] = __builtin_shuffle(odd_low, odd_high, ODD);
}

// The float of a bf16 or f16 in the low half of a word.
template <Element E>
inline float widen(uint32_t half) {
    uint32_t bits = half << 16;
    if (E == Element::F16) {
        const uint32_t magnitude = half & 0x7fff;
        float scaled;
        bits = magnitude << 13;
        memcpy(&scaled, &bits, 4);
        scaled *= 0x1p112f;  // the difference of the exponents' biases; exact for denormals too
        memcpy(&bits, &scaled, 4);
        bits = (half & 0x8000) << 16 | (magnitude >= 0x7c00 ? 0x7f800000 | magnitude << 13 : bits);
    }
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

template <Element E>
inline void widen(float* to, const uint16_t* from, int n) {
    for (int i = 0; i < n; i++) to[i] = widen<E>(from[i]);
}

// 16 rows of 8 elements (two fragments of 16-bit elements, one below the other) as 8 columns.
template <Element E>
inline void columns(Column* to, const uint32_t* top, const uint32_t* bottom) {
    Words words[4], pairs[4];
    memcpy(&words[0], top, 128);
    memcpy(&words[2], bottom, 128);
    separate(words, pairs);
    for (int t = 0; t < 4; t++) {
        for (int row = 0; row < 16; row++) {
            to[2 * t][row] = widen<E>(pairs[t][row] & 0xffff);
            to[2 * t + 1][row] = widen<E>(pairs[t][row] >> 16);
        }
    }
}

// 8 columns of a result, from a [K columns of 16 rows] and b, whose element (k, n) is b[k * down + n * across]. Products are exact, so that
// one instruction for both operations gives the same bits.
template <int K>
__attribute__((optimize("fp-contract=fast"))) void multiply(Column (&sum)[8], const Column* a, const float* b, int down, int across) {
    for (int n = 0; n < 8; n++) sum[n] = a[0] * b[n * across];
    for (int k = 1; k < K; k++) {
        for (int n = 0; n < 8; n++) sum[n] += a[k] * b[k * down + n * across];
    }
}

// 8 columns into the registers of a warp's lanes: rows[0], [1] have the top 8 rows of even and odd columns, rows[2], [3] the bottom 8 rows.
// `old`: what to add, or null pointers.
inline void scatter(const Column (&sum)[8], float* const (&to)[4], const float* const (&old)[4]) {
    for (int odd = 0; odd < 2; odd++) {
        Words in[4], out[4];
        for (int t = 0; t < 4; t++) memcpy(&in[t], &sum[2 * t + odd], 64);
        interleave(in, out);
        for (int half = 0; half < 2; half++) {
            const int i = 2 * half + odd;
            for (int part = 0; part < 2; part++) {
                Column values;
                memcpy(&values, &out[2 * half + part], 64);
                if (old[i]) {
                    Column before;
                    memcpy(&before, old[i] + 16 * part, 64);
                    values += before;
                }
                memcpy(to[i] + 16 * part, &values, 64);
            }
        }
    }
}

}  // namespace ptx
