// What a product of rows with their expert's weights does with its sums before it stores them: adds the bias, applies the activation, or
// multiplies by the activation's gradient. W neighbours of a row at a time; VECTOR: they are one access, all within the row.
//
// FORWARD     y = v + bias                                 v = W_e a,   y [R,N], bias [N] of the expert, or none
// TRANSPOSED  y = v                                        v = W_e^T a
// ACTIVATE    y = v + bias, hidden = activation(y)         y [R,2H or H], hidden [R,H]
// BACKWARD    y = v * activation'(pre_activation)          v = W_e^T a [R,H], pre_activation and y [R,2H or H]
#pragma once
#include "activation.cuh"
#include "common.cuh"

template <class T>
__device__ inline float kept(float x) {
    return to_float(from_float<T>(x));
}

constexpr int FORWARD = 0, TRANSPOSED = 1, ACTIVATE = 2, BACKWARD = 3;

template <class T>
struct Finish {
    const T* bias;  // of the expert, or null
    const T* pre_activation;
    T* y;
    T* hidden;
    int width;  // N, or H where there is an activation
    int kind;
    float limit;
};

template <bool VECTOR, int W, class T>
__device__ inline void load_some(const T* from, float (&to)[W], int count) {
    if constexpr (VECTOR) {
        load(from, to);
    } else {
#pragma unroll
        for (int i = 0; i < W; i++) to[i] = i < count ? to_float(from[i]) : 0.0f;
    }
}

template <bool VECTOR, int W, class T>
__device__ inline void store_some(T* to, const float (&from)[W], int count) {
    if constexpr (VECTOR) {
        store(to, from);
    } else {
#pragma unroll
        for (int i = 0; i < W; i++)
            if (i < count) to[i] = from_float<T>(from[i]);
    }
}

template <bool VECTOR, int W, class T>
__device__ inline void add_some(const T* from, float (&to)[W], int count) {
    float other[W];
    load_some<VECTOR>(from, other, count);
#pragma unroll
    for (int i = 0; i < W; i++) to[i] += other[i];
}

template <bool VECTOR, int W, class T>
__device__ inline void finish_plain(const Finish<T>& f, int row, int column, float (&v)[W]) {
    const int count = f.width - column;
    if (f.bias) add_some<VECTOR>(f.bias + column, v, count);
    store_some<VECTOR>(f.y + (long long)row * f.width + column, v, count);
}

// v: for swiglu the gates, with the other half in `up`. The activation is applied to y as rounded, so that backward differentiates the same.
template <bool VECTOR, int W, class T>
__device__ inline void finish_activate(const Finish<T>& f, int row, int column, float (&v)[W], float (&up)[W]) {
    const int count = f.width - column;
    const bool gated = f.kind == SWIGLU;
    T* y = f.y + (long long)row * (gated ? 2 * f.width : f.width) + column;
    float result[W];
    if (f.bias) add_some<VECTOR>(f.bias + column, v, count);
    store_some<VECTOR>(y, v, count);
    if (gated) {
        if (f.bias) add_some<VECTOR>(f.bias + f.width + column, up, count);
        store_some<VECTOR>(y + f.width, up, count);
#pragma unroll
        for (int i = 0; i < W; i++) result[i] = swiglu(kept<T>(v[i]), kept<T>(up[i]), f.limit);
    } else {
#pragma unroll
        for (int i = 0; i < W; i++) result[i] = pointwise(f.kind, kept<T>(v[i]));
    }
    store_some<VECTOR>(f.hidden + (long long)row * f.width + column, result, count);
}

template <bool VECTOR, int W, class T>
__device__ inline void finish_backward(const Finish<T>& f, int row, int column, float (&v)[W]) {
    const int count = f.width - column;
    const bool gated = f.kind == SWIGLU;
    const long long at = (long long)row * (gated ? 2 * f.width : f.width) + column;
    float x[W];
    load_some<VECTOR>(f.pre_activation + at, x, count);
    if (gated) {
        float up[W];
        load_some<VECTOR>(f.pre_activation + at + f.width, up, count);
#pragma unroll
        for (int i = 0; i < W; i++) {
            float dgate, dup;
            swiglu_backward(v[i], x[i], up[i], f.limit, dgate, dup);
            v[i] = dgate, up[i] = dup;
        }
        store_some<VECTOR>(f.y + at + f.width, up, count);
    } else {
#pragma unroll
        for (int i = 0; i < W; i++) v[i] *= pointwise_slope(f.kind, x[i]);
    }
    store_some<VECTOR>(f.y + at, v, count);
}
