// Numbers as PTX has them, where C++ differs: NaNs without a payload, .ftz and .sat, roundings other than to nearest, and bf16 and half.
//
// A float result that is not a number has the bits 0x7fffffff on a card; on this processor its sign may be set, and a kernel that sorts
// floats by their bits would put it elsewhere. `canonical` makes the difference go away. Doubles agree in both.
#pragma once
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <xmmintrin.h>
#endif

namespace ptx {

template <class To, class From>
inline To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From), "both have as many bits");
    To to;
    memcpy(&to, &value, sizeof to);
    return to;
}

constexpr uint32_t FLOAT_NAN = 0x7fffffffu;
constexpr uint16_t SMALL_NAN = 0x7fffu;  // of bf16 and half

inline float canonical(float x) { return x != x ? bits_as<float>(FLOAT_NAN) : x; }
inline double canonical(double x) { return x; }

// .ftz: a denormal counts as a zero of its sign.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// .sat: into [0, 1], and a NaN becomes 0.
inline float saturated(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline double saturated(double x) { return x > 0.0 ? (x < 1.0 ? x : 1.0) : 0.0; }

// While it lives, operations round as `mode` says (FE_DOWNWARD, ...). The compiler knows nothing of modes: what is to be rounded must be
// read from memory after it begins, and be written before it ends. fesetround would also set the mode of instructions that nobody uses,
// which takes longer than a row.
struct Rounding {
#ifdef __SSE2__
    const unsigned before = _mm_getcsr();
    explicit Rounding(int mode) {
        _mm_setcsr((before & ~0x6000u) | unsigned(mode) << 3);
        asm volatile("" ::: "memory");
    }
    ~Rounding() {
        asm volatile("" ::: "memory");
        _mm_setcsr(before);
    }
#else
    const int before = fegetround();
    explicit Rounding(int mode) {
        fesetround(mode);
        asm volatile("" ::: "memory");
    }
    ~Rounding() {
        asm volatile("" ::: "memory");
        fesetround(before);
    }
#endif
};

// The sum rounded to odd: if it is inexact, the neighbour whose last bit is 1. Rounded once more, to a format with at least two bits less,
// it gives the same as the exact sum would.
inline double sum_to_odd(double x, double y) {
    const double sum = x + y, part = sum - x;
    const double error = (x - (sum - part)) + (y - part);
    const uint64_t bits = bits_as<uint64_t>(sum);
    if (!(std::fabs(sum) < HUGE_VAL) || error == 0.0 || bits & 1) return sum;
    return bits_as<double>((error > 0) == (sum > 0) ? bits + 1 : bits - 1);
}

// ---- bf16 and half -------------------------------------------------------------------------------------------------------------------

// A format of 16 bits with its sign, EXPONENT bits, and MANTISSA bits.
template <int MANTISSA, int EXPONENT>
struct Small {
    static constexpr int LEAST = 2 - (1 << (EXPONENT - 1));  // the exponent of the smallest normal number
    static constexpr uint16_t INFINITE = uint16_t(((1 << EXPONENT) - 1) << MANTISSA);

    static double widen(uint16_t bits) {
        const int exponent = bits >> MANTISSA & ((1 << EXPONENT) - 1), mantissa = bits & ((1 << MANTISSA) - 1);
        double size;
        if (exponent == (1 << EXPONENT) - 1) size = mantissa ? NAN : HUGE_VAL;
        else if (exponent == 0) size = std::ldexp(double(mantissa), LEAST - MANTISSA);
        else size = std::ldexp(double(mantissa | 1 << MANTISSA), exponent - 1 + LEAST - MANTISSA);
        return bits & 0x8000 ? -size : size;
    }

    // Rounds once, as `mode` says.
    static uint16_t narrow(double x, int mode = FE_TONEAREST) {
        if (x != x) return SMALL_NAN;
        const bool negative = std::signbit(x);
        const uint16_t sign = negative ? 0x8000 : 0;
        const double size = std::fabs(x);
        if (size == HUGE_VAL) return sign | INFINITE;
        if (size == 0.0) return sign;
        const int exponent = std::ilogb(size) > LEAST ? std::ilogb(size) : LEAST;
        const double scaled = std::ldexp(size, MANTISSA - exponent), whole = std::floor(scaled), rest = scaled - whole;
        uint64_t mantissa = uint64_t(whole);
        const bool away = mode == (negative ? FE_DOWNWARD : FE_UPWARD);
        if (mode == FE_TONEAREST ? rest > 0.5 || (rest == 0.5 && mantissa & 1) : away && rest > 0) mantissa++;
        const uint64_t bits = (uint64_t(exponent - LEAST) << MANTISSA) + mantissa;
        if (bits < INFINITE) return sign | uint16_t(bits);
        return sign | (mode == FE_TONEAREST || away ? INFINITE : INFINITE - 1);
    }
};

using Bf16 = Small<7, 8>;
using Half = Small<10, 5>;

inline float float_of_bf16(uint16_t bits) { return bits_as<float>(uint32_t(bits) << 16); }

// Bf16::narrow in a form that the compiler makes vectors of.
inline uint16_t bf16_of_float(float x) {
    const uint32_t bits = bits_as<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return uint16_t(x != x ? uint32_t(SMALL_NAN) : rounded);
}

}  // namespace ptx
