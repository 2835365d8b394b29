// What a product of rows with their expert's weights does with its sums before they leave the processor: the bias, the activation, or the
// activation's gradient. W neighbours of a row at a time; VECTOR: they are one access, and all of them within the row.
//
// FORWARD     y = v + bias                                 v = W_e a,   y [R,N], bias [N] of the expert, or none
// TRANSPOSED  y = v                                        v = W_e^T a
// ACTIVATE    y = v + bias, hidden = activation(y)         y [R,2H or H], hidden [R,H]
// BACKWARD    y = v * activation'(before)                  v = W_e^T a [R,H], before and y [R,2H or H]
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
    const T* before;
    T* y;
    T* hidden;
    int outer;  // N, or H where there is an activation
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
    const int count = f.outer - column;
    if (f.bias) add_some<VECTOR>(f.bias + column, v, count);
    store_some<VECTOR>(f.y + (long long)row * f.outer + column, v, count);
}

// v: of swiglu the gates, `up` the other half. The activation is that of y as it is kept, so that backward differentiates what was computed.
template <bool VECTOR, int W, class T>
__device__ inline void finish_activate(const Finish<T>& f, int row, int column, float (&v)[W], float (&up)[W]) {
    const int count = f.outer - column;
    const bool gated = f.kind == SWIGLU;
    T* y = f.y + (long long)row * (gated ? 2 * f.outer : f.outer) + column;
    float result[W];
    if (f.bias) add_some<VECTOR>(f.bias + column, v, count);
    store_some<VECTOR>(y, v, count);
    if (gated) {
        if (f.bias) add_some<VECTOR>(f.bias + f.outer + column, up, count);
        store_some<VECTOR>(y + f.outer, up, count);
#pragma unroll
        for (int i = 0; i < W; i++) result[i] = swiglu(kept<T>(v[i]), kept<T>(up[i]), f.limit);
    } else {
#pragma unroll
        for (int i = 0; i < W; i++) result[i] = pointwise(f.kind, kept<T>(v[i]));
    }
    store_some<VECTOR>(f.hidden + (long long)row * f.outer + column, result, count);
}

template <bool VECTOR, int W, class T>
__device__ inline void finish_backward(const Finish<T>& f, int row, int column, float (&v)[W]) {
    const int count = f.outer - column;
    const bool gated = f.kind == SWIGLU;
    const long long at = (long long)row * (gated ? 2 * f.outer : f.outer) + column;
    float x[W];
    load_some<VECTOR>(f.before + at, x, count);
    if (gated) {
        float up[W];
        load_some<VECTOR>(f.before + at + f.outer, up, count);
#pragma unroll
        for (int i = 0; i < W; i++) {
            float dgate, dup;
            swiglu_backward(v[i], x[i], up[i], f.limit, dgate, dup);
            v[i] = dgate, up[i] = dup;
        }
        store_some<VECTOR>(f.y + at + f.outer, up, count);
    } else {
#pragma unroll
        for (int i = 0; i < W; i++) v[i] *= pointwise_slope(f.kind, x[i]);
    }
    store_some<VECTOR>(f.y + at, v, count);
}
