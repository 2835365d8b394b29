// random_bits, uniform, normal: random numbers that depend only on their index, by Philox (philox.cuh).   [count] <- seed, stream, micro, step
// One thread per counter computes its four numbers and stores them 16 bytes at a time (float: one access, int64: two). Nothing is summed.
// Bits and uniforms equal the reference's bit for bit. Normals are computed in double, as there, and rounded once.
// Bytes: 8 count (bits), 4 count (others).   Grid: ceil(count / 4 / block).
// Reference: minimoe/reference/random.py.   Unproven: no card has run it.
#include "philox.cuh"

constexpr double TWO_PI = 6.283185307179586232;
constexpr double HALF_PI_HIGH = 1.5707963267948965580, HALF_PI_LOW = 6.1232339957367658860e-17;  // their sum is pi / 2 in twice the digits

// The first index of a thread, and how many of its four numbers are within the array.
__device__ inline bool place(long long count, long long* first, int* here) {
    *first = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * WORDS;
    *here = int(min(count - *first, (long long)WORDS));
    return *first < count;
}

__device__ inline void store_four(float* to, const float (&from)[WORDS], int here) {
    if (here == WORDS) store<WORDS>(to, from);  // new arrays begin at multiples of 16 bytes
    else
        for (int i = 0; i < WORDS; i++)
            if (i < here) to[i] = from[i];
}

__global__ void random_bits(
    long long* bits, long long count, unsigned seed_low, unsigned seed_high, unsigned stream, const unsigned* micro_at, unsigned micro,
    const unsigned* step_at, unsigned step
) {
    long long first;
    int here;
    if (!place(count, &first, &here)) return;
    const uint4 words = philox(unsigned(first / WORDS), make_draw(seed_low, seed_high, stream, micro_at, micro, step_at, step));
    if (here == WORDS) {  // an int64 is a word and a word of zeros
        store_16(bits + first, make_uint4(words.x, 0, words.y, 0));
        store_16(bits + first + 2, make_uint4(words.z, 0, words.w, 0));
    } else {
        bits[first] = words.x;
        if (here > 1) bits[first + 1] = words.y;
        if (here > 2) bits[first + 2] = words.z;
    }
}

__global__ void uniform(
    float* y, long long count, unsigned seed_low, unsigned seed_high, unsigned stream, const unsigned* micro_at, unsigned micro,
    const unsigned* step_at, unsigned step
) {
    long long first;
    int here;
    if (!place(count, &first, &here)) return;
    float u[WORDS];
    uniforms(unsigned(first / WORDS), make_draw(seed_low, seed_high, stream, micro_at, micro, step_at, step), u);
    store_four(y + first, u, here);
}

// cos and sin of an angle in [0, 2 pi], by their series on [-pi/4, pi/4]: those of the library keep a table in local memory.
__device__ inline void cos_sin(double angle, double* cosine, double* sine) {
    const int quarter = int(angle * 0.63661977236758138 + 0.5);
    const double x = fma(-double(quarter), HALF_PI_LOW, fma(-double(quarter), HALF_PI_HIGH, angle)), s = x * x;
    double c = 1.0 / 20922789888000.0, d = -1.0 / 1307674368000.0;  // 1 / 16!, -1 / 15!
    c = c * s - 1.0 / 87178291200.0;
    c = c * s + 1.0 / 479001600.0;
    c = c * s - 1.0 / 3628800.0;
    c = c * s + 1.0 / 40320.0;
    c = c * s - 1.0 / 720.0;
    c = c * s + 1.0 / 24.0;
    c = c * s - 0.5;
    c = c * s + 1.0;
    d = d * s + 1.0 / 6227020800.0;
    d = d * s - 1.0 / 39916800.0;
    d = d * s + 1.0 / 362880.0;
    d = d * s - 1.0 / 5040.0;
    d = d * s + 1.0 / 120.0;
    d = d * s - 1.0 / 6.0;
    d = fma(d * s, x, x);
    const double first = quarter & 1 ? d : c, second = quarter & 1 ? c : d;
    *cosine = (quarter + 1) & 2 ? -first : first;
    *sine = quarter & 2 ? -second : second;
}

// Box and Muller: sqrt(-2 ln(1 - u0)) * (cos, sin)(2 pi u1) from neighbours u0, u1.
__device__ inline void normal_pair(float u0, float u1, float* first, float* second) {
    double cosine, sine;
    cos_sin(TWO_PI * double(u1), &cosine, &sine);
    const double radius = sqrt(-2.0 * log(1.0 - double(u0)));
    *first = float(radius * cosine);
    *second = float(radius * sine);
}

__global__ void normal(
    float* y, long long count, unsigned seed_low, unsigned seed_high, unsigned stream, const unsigned* micro_at, unsigned micro,
    const unsigned* step_at, unsigned step
) {
    long long first;
    int here;
    if (!place(count, &first, &here)) return;
    float u[WORDS], z[WORDS];
    uniforms(unsigned(first / WORDS), make_draw(seed_low, seed_high, stream, micro_at, micro, step_at, step), u);
    normal_pair(u[0], u[1], &z[0], &z[1]);
    normal_pair(u[2], u[3], &z[2], &z[3]);
    store_four(y + first, z, here);
}

// dropout: y = x / (1 - rate) where uniform >= rate, else 0. Forward and backward are the same, and no mask is kept.   [count] <- [count]
// One thread per 16 bytes: one counter (float) or two (bf16); with V = 1, for arrays that begin elsewhere, one counter, element by element.
// `factor` is 1 / (1 - rate).   Bytes: 2 count sizeof(T).   Grid: ceil(count / max(V, 4) / block).
template <class T, int V>
__global__ void dropout(
    const T* __restrict__ x, T* __restrict__ y, long long count, float rate, float factor, unsigned seed_low, unsigned seed_high,
    unsigned stream, const unsigned* micro_at, unsigned micro, const unsigned* step_at, unsigned step
) {
    constexpr int MINE = V > WORDS ? V : WORDS;
    const long long first = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * MINE;
    if (first >= count) return;
    const bool whole = V > 1 && count - first >= MINE;
    float values[MINE] = {};
    if constexpr (V > 1) {
        if (whole) load<V>(x + first, values);
    }
    if (!whole) {
#pragma unroll
        for (int i = 0; i < MINE; i++)
            if (first + i < count) values[i] = to_float(x[first + i]);
    }
    const Draw draw = make_draw(seed_low, seed_high, stream, micro_at, micro, step_at, step);
#pragma unroll
    for (int part = 0; part < MINE; part += WORDS) {
        float u[WORDS];
        uniforms(unsigned((first + part) / WORDS), draw, u);
#pragma unroll
        for (int i = 0; i < WORDS; i++) values[part + i] *= u[i] >= rate ? factor : 0.0f;
    }
    if constexpr (V > 1) {
        if (whole) store<V>(y + first, values);
    }
    if (!whole) {
#pragma unroll
        for (int i = 0; i < MINE; i++)
            if (first + i < count) y[first + i] = from_float<T>(values[i]);
    }
}
