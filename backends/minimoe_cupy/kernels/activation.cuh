// Activations of one number (swiglu: of two) and their gradients, in float. activation.cu runs them over arrays, grouped_finish.cuh at the end
// of products. NaN stays NaN, and infinities give what the reference gives.
//
// exp is __expf and a sigmoid's division __fdividef: some twenty instructions per activation are as many as a processor has time for while
// bfloat16 is loaded and stored. Their error, a few ulp + |x| 2^-24, matters where exp is large, and there the sigmoid is nearly zero.
// Reference: minimoe/reference/activation.py.
#pragma once

constexpr int SWIGLU = 0, GELU = 1, GELU_TANH = 2, RELU = 3;

constexpr float CLIPPED_ALPHA = 1.702f;
constexpr float ROOT_HALF = 0.70710678f, DENSITY = 0.39894228f;   // sqrt(1/2), 1/sqrt(2 pi)
constexpr float TANH_SCALE = 0.79788456f, TANH_CUBE = 0.044715f;  // sqrt(2/pi)

__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }  // an exp that overflows gives the right 0

// What swiglu multiplies: gate and up, clipped if limit > 0, and whether each is within the limit. These comparisons keep NaN; fminf does not.
struct Gated {
    float gate, up, alpha, open_gate, open_up;
};

__device__ inline Gated clip_gated(float gate, float up, float limit) {
    if (!(limit > 0.0f)) return {gate, up, 1.0f, 1.0f, 1.0f};
    const float clipped = up < -limit ? -limit : up > limit ? limit : up;
    return {gate > limit ? limit : gate, clipped + 1.0f, CLIPPED_ALPHA, gate <= limit ? 1.0f : 0.0f, fabsf(up) <= limit ? 1.0f : 0.0f};
}

__device__ inline float swiglu(float gate, float up, float limit) {
    const Gated x = clip_gated(gate, up, limit);
    return sigmoid(x.alpha * x.gate) * x.gate * x.up;
}

__device__ inline void swiglu_backward(float dy, float gate, float up, float limit, float& dgate, float& dup) {
    const Gated x = clip_gated(gate, up, limit);
    const float s = sigmoid(x.alpha * x.gate), silu = x.gate * s;
    dgate = (s + x.alpha * silu * (1.0f - s)) * x.up * dy * x.open_gate;
    dup = silu * dy * x.open_up;
}

// The tanh form by a sigmoid, (1 + tanh(z)) / 2 = sigmoid(2z): one exp and one division.
__device__ inline float tanh_share(float x) { return sigmoid(2.0f * x * (TANH_SCALE + TANH_SCALE * TANH_CUBE * x * x)); }

__device__ inline float pointwise(int kind, float x) {
    if (kind == RELU) return x < 0.0f ? 0.0f : x;
    if (kind == GELU_TANH) return x * tanh_share(x);
    return 0.5f * x * (1.0f + erff(x * ROOT_HALF));
}

__device__ inline float pointwise_slope(int kind, float x) {
    if (kind == RELU) return x > 0.0f ? 1.0f : 0.0f;
    if (kind == GELU_TANH) {
        const float share = tanh_share(x);
        return share + 2.0f * x * share * (1.0f - share) * (TANH_SCALE + 3.0f * TANH_SCALE * TANH_CUBE * x * x);
    }
    return 0.5f * (1.0f + erff(x * ROOT_HALF)) + x * DENSITY * __expf(-0.5f * x * x);
}
