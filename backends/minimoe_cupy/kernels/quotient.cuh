// n / d, exact for 0 <= n < 2^31, without a division: floor(n (2^(31+s) / d + 1) / 2^(31+s)) with 2^s >= d   (Granlund & Montgomery 1994).
// A division by a number that only the host knows takes a reciprocal in float, two conversions and corrections: some 20 instructions.
#pragma once

// As `quotient` in launch.py computes them from d.
struct Quotient {
    unsigned factor;
    int shift;

    __device__ int of(int n) const { return int(__umulhi(2u * unsigned(n), factor) >> shift); }
};
