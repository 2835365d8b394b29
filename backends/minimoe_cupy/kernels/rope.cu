// Rotary positions (rope), and one projection's rows cut into the heads of q, k and v with q and k rotated (split_heads); and their gradients.
// angle[n,i] = positions[n] * inv_freq[i], rounded to float as in the reference;  (a, b) -> (a cos - b sin, b cos + a sin) * scale.
// Pairs are (i, i + P) or, interleaved, (2i, 2i + 1); elements past 2 P, and the heads of v, are copied. P <= C / 2; P = 0: no rotation.
// A block has (accesses of a head, heads, tokens): a thread computes the cosines and sines of V pairs of one token once, and rotates those pairs
// in every blockDim.y-th head, 16 bytes per access where C and P allow. An element is read by the thread that writes to its address, and before
// it does, so rope may work in place. Nothing is summed.
// Bytes: 2 N heads C sizeof(T), heads = Q + 2 G.   FLOPs: 6 per pair, and those of the angles.   Grid: ceil(N / blockDim.z), N = B*T.
// Reference: minimoe/reference/rope.py.   Unproven: no card has run it.
#include "angle.cuh"
#include "common.cuh"

constexpr int BLOCK = 256;

struct Turn {
    int heads, turned;  // of a token: all, and how many of the first are rotated
    int width, pairs;   // of a head: C, P
    float scale, sine_scale;
    bool interleaved;
};

// Where a token's heads are: side by side, or in one array each for q, k and v.
template <class T>
struct Joined {
    T* x;
    int heads, width;
    __device__ T* head(long long token, int h) const { return x + (token * heads + h) * width; }
};

template <class T>
struct Parted {
    T *q, *k, *v;
    int heads, groups, width;
    __device__ T* head(long long token, int h) const {
        if (h < heads) return q + (token * heads + h) * width;
        const bool value = h - heads >= groups;
        return (value ? v : k) + (token * groups + h - heads - (value ? groups : 0)) * width;
    }
};

__device__ inline void turn_pair(float& a, float& b, float cosine, float sine) {
    const float first = a * cosine - b * sine, second = b * cosine + a * sine;
    a = first;
    b = second;
}

// V pairs in two accesses: the first halves and then the second halves, or pair after pair.
template <int V>
__device__ inline void turn_pairs(float (&low)[V], float (&high)[V], const float (&cosine)[V], const float (&sine)[V], bool interleaved) {
    if (V == 1 || !interleaved) {
#pragma unroll
        for (int j = 0; j < V; j++) turn_pair(low[j], high[j], cosine[j], sine[j]);
    } else {
#pragma unroll
        for (int j = 0; j + 1 < V; j += 2) {
            turn_pair(low[j], low[j + 1], cosine[j / 2], sine[j / 2]);
            turn_pair(high[j], high[j + 1], cosine[(V + j) / 2], sine[(V + j) / 2]);
        }
    }
}

template <int V, class From, class To>
__device__ inline void turn_token(From from, To to, int tokens, const int* positions, int n_positions, const float* inv_freq, Turn turn) {
    const int token = blockIdx.x * blockDim.z + threadIdx.z;
    if (token >= tokens) return;
    for (int i = threadIdx.x * V; i < turn.pairs; i += blockDim.x * V) {
        const float position = float(positions[token % n_positions]);
        float cosine[V], sine[V], low[V], high[V];
#pragma unroll
        for (int j = 0; j < V; j++) {
            cos_sin(position * inv_freq[i + j], &cosine[j], &sine[j]);
            cosine[j] *= turn.scale;
            sine[j] *= turn.sine_scale;
        }
        const int first = turn.interleaved ? 2 * i : i, second = turn.interleaved ? first + V : i + turn.pairs;
#pragma unroll 2
        for (int h = threadIdx.y; h < turn.heads; h += blockDim.y) {
            const auto* x = from.head(token, h);
            load(x + first, low);
            load(x + second, high);
            if (h < turn.turned) turn_pairs(low, high, cosine, sine, turn.interleaved);
            auto* y = to.head(token, h);
            store(y + first, low);
            store(y + second, high);
        }
    }
    for (int i = 2 * turn.pairs + threadIdx.x * V; i < turn.width; i += blockDim.x * V) {
        for (int h = threadIdx.y; h < turn.heads; h += blockDim.y) {
            float values[V];
            load(from.head(token, h) + i, values);
            store(to.head(token, h) + i, values);
        }
    }
}

// rope, and with `turn` -1 its backward                                                    [N,heads,C] <- [N,heads,C], [N or T], [P]
template <class T, int V>
__global__ void __launch_bounds__(BLOCK) rope(
    const T* x, const int* positions, const float* inv_freq, T* y, int tokens, int n_positions, int heads, int width, int pairs,
    float scale, float turn, bool interleaved
) {
    const Joined<const T> from = {x, heads, width};
    const Joined<T> to = {y, heads, width};
    turn_token<V>(from, to, tokens, positions, n_positions, inv_freq, {heads, heads, width, pairs, scale, scale * turn, interleaved});
}

// split_heads                                                            q [N,Q,C], k, v [N,G,C] <- qkv [N,(Q+2G)*C], [N or T], [P]
template <class T, int V>
__global__ void __launch_bounds__(BLOCK) split_heads(
    const T* qkv, const int* positions, const float* inv_freq, T* q, T* k, T* v, int tokens, int n_positions, int heads, int groups,
    int width, int pairs
) {
    const int all = heads + 2 * groups;
    const Joined<const T> from = {qkv, all, width};
    const Parted<T> to = {q, k, v, heads, groups, width};
    turn_token<V>(from, to, tokens, positions, n_positions, inv_freq, {all, heads + groups, width, pairs, 1.0f, 1.0f, false});
}

// split_heads_backward: dq and dk rotated back, all three side by side                           dqkv [N,(Q+2G)*C] <- dq, dk, dv, ...
template <class T, int V>
__global__ void __launch_bounds__(BLOCK) split_heads_backward(
    const T* dq, const T* dk, const T* dv, const int* positions, const float* inv_freq, T* dqkv, int tokens, int n_positions, int heads,
    int groups, int width, int pairs
) {
    const int all = heads + 2 * groups;
    const Parted<const T> from = {dq, dk, dv, heads, groups, width};
    const Joined<T> to = {dqkv, all, width};
    turn_token<V>(from, to, tokens, positions, n_positions, inv_freq, {all, heads + groups, width, pairs, 1.0f, -1.0f, false});
}
