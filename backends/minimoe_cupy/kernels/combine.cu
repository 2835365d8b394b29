// combine: y[n] = sum over j of weights[n,j] * rows[inverse[n,j]]           [N,D] <- [R,D], [N,W], [N,W]
// The backward of dispatch is the same kernel with weights of one (weights == nullptr).
// One warp per token. A gathered row comes from memory, so each lane loads V elements (16 bytes where D allows) of AT_ONCE rows before it adds
// the first of them: all that a token has (W <= AT_ONCE), or MOST at a time. Slots are summed in order, so equal inputs give equal bits.
// An inverse of -1 (dropped, padding) adds nothing, and no row is read for it.
// Bytes: (used slots + N) * D * sizeof(T), and 8 N W.   Grid: ceil(N / WARPS), block 32 * WARPS.
// Reference: minimoe/reference/routing.py.   Unproven: no card has run it.
#include "common.cuh"

constexpr int WARPS = 8;
constexpr int MOST = 8;  // rows that a lane loads at once

template <int AT_ONCE>
constexpr int BLOCKS = AT_ONCE < MOST ? 4 : 3;  // on a processor: fewer would not load more, more would leave MOST rows too few registers

// V elements as they lie in memory: in bf16 they take half the registers of their floats.
template <class T, int V>
struct Held {
    uint4 words;
    __device__ void load_from(const T* from) { words = *reinterpret_cast<const uint4*>(from); }
    __device__ void widen(float (&to)[V]) const {
        const T* kind = nullptr;
        unpack(words.x, to, 0, kind);
        unpack(words.y, to, 1, kind);
        unpack(words.z, to, 2, kind);
        unpack(words.w, to, 3, kind);
    }
};
template <class T>
struct Held<T, 1> {
    T element;
    __device__ void load_from(const T* from) { element = *from; }
    __device__ void widen(float (&to)[1]) const { to[0] = to_float(element); }
};

// AT_ONCE slots of a token, from the j-th on: their rows, -1 for none, and their weights.
template <int AT_ONCE>
struct Slots {
    int row[AT_ONCE];
    float weight[AT_ONCE];

    __device__ Slots(const int* inverse, const float* weights, long long token, int j, int width) {
        const long long first = token * width + j;
#pragma unroll
        for (int s = 0; s < AT_ONCE; s++) row[s] = j + s < width ? inverse[first + s] : -1;
        // -0 * 0 can be added without a condition: x + -0 is x for every x, -0 included
#pragma unroll
        for (int s = 0; s < AT_ONCE; s++) weight[s] = row[s] < 0 ? -0.0f : weights ? weights[first + s] : 1.0f;
    }

    template <class T, int V>
    __device__ void load_rows(const T* rows, int d, int d_model, Held<T, V> (&held)[AT_ONCE]) const {
#pragma unroll
        for (int s = 0; s < AT_ONCE; s++) {
            held[s] = {};
            if (row[s] >= 0) held[s].load_from(rows + (long long)row[s] * d_model + d);
        }
    }
};

template <class T, int AT_ONCE, int V>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS<AT_ONCE>) combine(
    const T* __restrict__ rows, const float* __restrict__ weights, const int* __restrict__ inverse, T* __restrict__ y, int n_tokens, int width,
    int d_model
) {
    const long long token = (long long)blockIdx.x * WARPS + threadIdx.x / WARP;
    if (token >= n_tokens) return;
    Slots<AT_ONCE> slots(inverse, weights, token, 0, width);
    for (int d = threadIdx.x % WARP * V; d < d_model; d += WARP * V) {
        float sum[V] = {};
        for (int j = 0; j < (AT_ONCE < MOST ? 1 : width); j += AT_ONCE) {
            if (AT_ONCE == MOST && width > MOST) slots = Slots<AT_ONCE>(inverse, weights, token, j, width);
            Held<T, V> held[AT_ONCE];
            slots.load_rows(rows, d, d_model, held);
#pragma unroll
            for (int s = 0; s < AT_ONCE; s++) {
                float part[V];
                held[s].widen(part);
#pragma unroll
                for (int i = 0; i < V; i++) sum[i] += slots.weight[s] * part[i];
            }
        }
        store(y + token * d_model + d, sum);
    }
}

// combine_backward: drows[inverse[n,j]] = weights[n,j] * dy[n],   dweights[n,j] = <rows[inverse[n,j]], dy[n]>, 0 for slots without a row.
// One warp per token: dy[n] is read once for AT_ONCE slots, whose rows are loaded together. Rows at or past offsets[E] are not written.
// Bytes: (2 * used slots + N) * D * sizeof(T), and 12 N W.
template <class T, int AT_ONCE, int V>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS<AT_ONCE>) combine_backward(
    const T* __restrict__ dy, const T* __restrict__ rows, const float* weights, const int* inverse, T* __restrict__ drows, float* dweights,
    int n_tokens, int width, int d_model
) {
    const long long token = (long long)blockIdx.x * WARPS + threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    if (token >= n_tokens) return;  // the same for all lanes of a warp
    for (int j = 0; j < (AT_ONCE < MOST ? 1 : width); j += AT_ONCE) {
        const Slots<AT_ONCE> slots(inverse, weights, token, j, width);
        float inner[AT_ONCE] = {};
        for (int d = lane * V; d < d_model; d += WARP * V) {
            Held<T, V> held[AT_ONCE];
            float gradient[V];
            load(dy + token * d_model + d, gradient);
            slots.load_rows(rows, d, d_model, held);
#pragma unroll
            for (int s = 0; s < AT_ONCE; s++) {
                if (slots.row[s] < 0) continue;
                float value[V], scaled[V];
                held[s].widen(value);
#pragma unroll
                for (int i = 0; i < V; i++) {
                    inner[s] += gradient[i] * value[i];
                    scaled[i] = slots.weight[s] * gradient[i];
                }
                store(drows + (long long)slots.row[s] * d_model + d, scaled);
            }
        }
#pragma unroll
        for (int s = 0; s < AT_ONCE; s++) {
            const float whole = warp_sum(inner[s]);
            if (lane == 0 && j + s < width) dweights[token * width + j + s] = whole;
        }
    }
}
