// Cosine and sine of any angle in radians, by their series on [-pi/4, pi/4]: those of the library keep a table in local memory.
// The remainder of the angle is computed in double: within 1.2e-7 of the exact values up to 2^28, within 5e-7 up to 2^31, where positions end.
// About 10 operations in double, 15 in float. An angle of infinity gives NaN.
#pragma once

constexpr double QUARTERS = 0.63661977236758134308;  // of a turn, in a radian: 2 / pi
constexpr float HALF_PI = 1.57079632679489661923f;

__device__ inline void cos_sin(float angle, float* cosine, float* sine) {
    const double quarters = angle * QUARTERS, whole = rint(quarters);
    const int quarter = int((long long)whole & 3);
    const float x = float(quarters - whole) * HALF_PI, s = x * x;
    float c = 2.44331571e-5f, d = -1.95152959e-4f;  // the polynomials of Cephes (Moshier 1989)
    c = c * s - 1.38877297e-3f;
    c = c * s + 4.16666457e-2f;
    c = (c * s - 0.5f) * s + 1.0f;
    d = d * s + 8.33216087e-3f;
    d = d * s - 1.66666546e-1f;
    d = d * s * x + x;
    const float cosine_like = quarter & 1 ? d : c, sine_like = quarter & 1 ? c : d;
    *cosine = (quarter + 1) & 2 ? -cosine_like : cosine_like;
    *sine = quarter & 2 ? -sine_like : sine_like;
}
