// adamw, sgd, lion: update a whole flat buffer of parameters in one launch, in place.                                      [P] each
// lr, scale (the clip), step and ok (the verdict on non-finite values) are on the device; nothing is written if ok is false.
// One thread per V elements (16 bytes) of each buffer, with all loads before the first store; an incomplete last access is done one by one.
// Bytes: adamw 7 P sizeof(T), the others 5 P.   Grid: ceil(P / V / block).
// sum_of_squares [1] <- [P] is below: two launches, each of which sums in an order that only the shape fixes.
// Reference: minimoe/reference/optimizer.py.   Unproven: no card has run it.
#include "common.cuh"

// Load and store the `here` elements that are left of the buffer: V of them, or fewer in its last thread.
template <int V, class T>
__device__ inline void load_here(const T* from, float (&to)[V], int here) {
    if (here == V) load(from, to);
    else {
#pragma unroll
        for (int i = 0; i < V; i++) to[i] = i < here ? to_float(from[i]) : 0.0f;
    }
}

template <int V, class T>
__device__ inline void store_here(T* to, const float (&from)[V], int here) {
    if (here == V) store(to, from);
    else {
#pragma unroll
        for (int i = 0; i < V; i++)
            if (i < here) to[i] = from_float<T>(from[i]);
    }
}

template <int V>
__device__ inline bool place(long long count, long long* first, int* here) {
    *first = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * V;
    *here = int(min(count - *first, (long long)V));
    return *first < count;
}

// m = b1 m + (1-b1) g,  v = b2 v + (1-b2) g^2,  w = w (1 - lr wd) - lr m^ / (sqrt(v^) + eps),  ^ over 1 - b^step, which is
// -expm1(step ln b): b^step in float would leave few digits of it in the first steps. new1 = 1 - b1, ln_b1 = ln b1, from the host in double.
template <class T, int V>
__global__ void adamw(
    T* __restrict__ param, T* __restrict__ m, T* __restrict__ v, const T* __restrict__ grad, const float* lr, const int* step,
    const float* scale, const bool* ok, float beta1, float beta2, float new1, float new2, float ln_beta1, float ln_beta2, float eps,
    float weight_decay, long long count
) {
    long long first;
    int here;
    if (!place<V>(count, &first, &here)) return;
    float w[V], g[V], m_[V], v_[V];
    load_here(param + first, w, here);
    load_here(m + first, m_, here);
    load_here(v + first, v_, here);
    load_here(grad + first, g, here);
    if (!*ok) return;
    const float rate = *lr, clip = *scale, t = float(*step), shrink = 1.0f - rate * weight_decay;
    const float rate1 = rate / -expm1f(t * ln_beta1), correct2 = 1.0f / sqrtf(-expm1f(t * ln_beta2));
#pragma unroll
    for (int i = 0; i < V; i++) {
        const float gradient = g[i] * clip;
        m_[i] = beta1 * m_[i] + new1 * gradient;
        v_[i] = beta2 * v_[i] + new2 * (gradient * gradient);
        w[i] = w[i] * shrink - rate1 * (m_[i] / (sqrtf(v_[i]) * correct2 + eps));
    }
    store_here(param + first, w, here);
    store_here(m + first, m_, here);
    store_here(v + first, v_, here);
}

// m = mu m + g,  w = w (1 - lr wd) - lr m
template <class T, int V>
__global__ void sgd(
    T* __restrict__ param, T* __restrict__ m, const T* __restrict__ grad, const float* lr, const float* scale, const bool* ok,
    float momentum, float weight_decay, long long count
) {
    long long first;
    int here;
    if (!place<V>(count, &first, &here)) return;
    float w[V], g[V], m_[V];
    load_here(param + first, w, here);
    load_here(m + first, m_, here);
    load_here(grad + first, g, here);
    if (!*ok) return;
    const float rate = *lr, clip = *scale, shrink = 1.0f - rate * weight_decay;
#pragma unroll
    for (int i = 0; i < V; i++) {
        m_[i] = momentum * m_[i] + g[i] * clip;
        w[i] = w[i] * shrink - rate * m_[i];
    }
    store_here(param + first, w, here);
    store_here(m + first, m_, here);
}

__device__ inline float sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x; }  // NaN stays NaN

// w = w (1 - lr wd) - lr sign(b1 m + (1-b1) g),  m = b2 m + (1-b2) g.   new1 = 1 - b1, from the host in double.
template <class T, int V>
__global__ void lion(
    T* __restrict__ param, T* __restrict__ m, const T* __restrict__ grad, const float* lr, const float* scale, const bool* ok,
    float beta1, float beta2, float new1, float new2, float weight_decay, long long count
) {
    long long first;
    int here;
    if (!place<V>(count, &first, &here)) return;
    float w[V], g[V], m_[V];
    load_here(param + first, w, here);
    load_here(m + first, m_, here);
    load_here(grad + first, g, here);
    if (!*ok) return;
    const float rate = *lr, clip = *scale, shrink = 1.0f - rate * weight_decay;
#pragma unroll
    for (int i = 0; i < V; i++) {
        const float gradient = g[i] * clip;
        w[i] = w[i] * shrink - rate * sign(beta1 * m_[i] + new1 * gradient);
        m_[i] = beta2 * m_[i] + new2 * gradient;
    }
    store_here(param + first, w, here);
    store_here(m + first, m_, here);
}

constexpr int SUM_BLOCK = 512;

// The sum over a block of SUM_BLOCK threads, as a tree; the first thread gets it.
__device__ inline float block_sum(float sum) {
    __shared__ float sums[SUM_BLOCK / WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    sum = warp_sum(sum);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    if (warp) return 0.0f;
    return warp_sum(lane < SUM_BLOCK / WARP ? sums[lane] : 0.0f);
}

// sum_of_squares, first launch: partial[b] = the squares that fall to block b: access b * SUM_BLOCK + t, then one grid's width further each time.
// Four sums per thread, so that an addition need not wait for the previous one.   Bytes: P sizeof(T).   Grid: at most 1024, block SUM_BLOCK.
template <int V, class T>
__global__ void __launch_bounds__(SUM_BLOCK) sum_of_squares(const T* __restrict__ x, float* partial, long long count) {
    const long long stride = (long long)gridDim.x * SUM_BLOCK * V;
    float four[4] = {}, values[V];
#pragma unroll 4
    for (long long first = ((long long)blockIdx.x * SUM_BLOCK + threadIdx.x) * V; first < count; first += stride) {
        load_here(x + first, values, int(min(count - first, (long long)V)));
#pragma unroll
        for (int i = 0; i < V; i++) four[i % 4] += values[i] * values[i];
    }
    const float sum = block_sum((four[0] + four[1]) + (four[2] + four[3]));
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// Second launch: one block adds the partial sums.
__global__ void __launch_bounds__(SUM_BLOCK) sum_partial(const float* partial, float* y, int count) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < count; i += SUM_BLOCK) sum += partial[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *y = sum;
}
