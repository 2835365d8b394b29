// Cross-entropy fused with log-softmax, in nats, and with the head's product:
//   cross_entropy           losses, logsumexp [N] <- logits [N,V], targets [N]       cross_entropy_backward   dlogits [N,V] <- dloss, logits, ..
//   head_loss               losses [N], and softmax - onehot in place of the logits    total_loss, scaled       the sum and count; x * dloss
// blockDim.x threads per row: one warp, with blockDim.y rows per block, or a whole block; rows may have hundreds of thousands of columns.
// Accesses are of 16 bytes even in rows of odd width: the first and last few elements, up to where the row is aligned, are loaded one by one.
// Maximum and sum are computed in one pass, online (Milakov & Gimelshein 2018), each thread in the order of its columns, then as a tree. exp is
// __expf: its error, about 2 ulp + |x| 2^-24, is largest where exp is negligible beside the row's maximum.
// Grid: ceil(N / blockDim.y).   Bytes: with each kernel.   Reference: minimoe/reference/loss.py.   Unproven: no card has run it.
#include "common.cuh"

constexpr int MOST = 1024;  // threads of a block, at most
constexpr int MOST_WARPS = MOST / WARP;

// The sum of exp(z) so far, as sum * exp(top); -inf and 0 before the first.
struct Online {
    float top, sum;
};

__device__ inline float shrink(float from, float to) { return from == to ? 1.0f : __expf(from - to); }  // also for two infinities

__device__ inline Online merge(Online a, Online b) {
    const float top = fmaxf(a.top, b.top);
    return {top, a.sum * shrink(a.top, top) + b.sum * shrink(b.top, top)};
}

template <int V>
__device__ inline void see(Online& seen, const float (&z)[V]) {
    float top = seen.top;
#pragma unroll
    for (int i = 0; i < V; i++) top = fmaxf(top, z[i]);  // ignores a NaN, which the sum then restores
    const float shift = top == -infinity() ? 0.0f : top;
    float sum = seen.sum * shrink(seen.top, top);
#pragma unroll
    for (int i = 0; i < V; i++) sum += __expf(z[i] - shift);
    seen = {top, sum};
}

__device__ inline Online warp_merge(Online seen) {
#pragma unroll
    for (int offset = WARP / 2; offset; offset /= 2)
        seen = merge(seen, {__shfl_xor_sync(ALL_LANES, seen.top, offset), __shfl_xor_sync(ALL_LANES, seen.sum, offset)});
    return seen;
}

// Joins the sums of a row's threads; all of them get the result.
__device__ inline Online row_merge(Online seen, Online* shared) {
    seen = warp_merge(seen);
    if (blockDim.x == WARP) return seen;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (lane == 0) shared[warp] = seen;
    __syncthreads();
    return warp_merge(lane < blockDim.x / WARP ? shared[lane] : Online{-infinity(), 0.0f});
}

// log(sum(exp(z))) of a row; NaN if it has a NaN or an infinity, and -inf if it is all -inf.
__device__ inline float logsumexp_of(Online seen) { return (seen.top == -infinity() ? 0.0f : seen.top) + logf(seen.sum); }

// The aligned middle of a row: where it begins, and how many accesses it has.
struct Middle {
    int head, accesses, tail;  // tail: the first element after it
};

template <int V>
__device__ inline Middle middle_of(long long begin, int width) {
    const int head = min(width, int((V - begin % V) % V)), accesses = (width - head) / V;
    return {head, accesses, head + accesses * V};
}

// 16 numbers at a time at most: with more, not all compilers keep head_loss in 32 registers, with which two blocks of 1024 threads share an SM.
template <int V, class T>
__device__ inline Online online_of(const T* row, Middle middle, int width) {
    constexpr int AT_ONCE = V == 8 ? 2 : 4;
    Online seen = {-infinity(), 0.0f};
    float z[V], one[1];
#pragma unroll AT_ONCE
    for (int i = threadIdx.x; i < middle.accesses; i += blockDim.x) {
        load(row + middle.head + i * V, z);
        see(seen, z);
    }
    if constexpr (V > 1) {
        const int edge = int(threadIdx.x) < middle.head ? threadIdx.x : middle.tail + threadIdx.x - middle.head;
        if (edge < width) {
            load(row + edge, one);
            see(seen, one);
        }
    }
    return seen;
}

// factor * (exp(z - lse) - [column == target]) of the V columns from `column` on.
template <int V, class T>
__device__ inline void differentiate(const T* row, T* gradient, int column, float lse, int target, float factor) {
    float z[V];
    load(row + column, z);
#pragma unroll
    for (int i = 0; i < V; i++) z[i] = factor * (__expf(z[i] - lse) - (column + i == target ? 1.0f : 0.0f));
    store(gradient + column, z);
}

// Goes from the row's end to its start: what was read last is still in a cache. `gradient` may be `row`.
template <int V, class T>
__device__ inline void differentiate_row(const T* row, T* gradient, Middle middle, int width, float lse, int target, float factor) {
    if constexpr (V > 1) {
        const int edge = int(threadIdx.x) < middle.head ? threadIdx.x : middle.tail + threadIdx.x - middle.head;
        if (edge < width) differentiate<1>(row, gradient, edge, lse, target, factor);
    }
    const int rounds = (middle.accesses - int(threadIdx.x) + int(blockDim.x) - 1) / int(blockDim.x);
    for (int round = rounds - 1; round >= 0; round--)
        differentiate<V>(row, gradient, middle.head + (round * int(blockDim.x) + int(threadIdx.x)) * V, lse, target, factor);
}

template <int V, class T>
__device__ inline void fill_row(T* row, Middle middle, int width, float value) {
    float values[V], one[1] = {value};
#pragma unroll
    for (int i = 0; i < V; i++) values[i] = value;
    for (int i = threadIdx.x; i < middle.accesses; i += blockDim.x) store(row + middle.head + i * V, values);
    if constexpr (V > 1) {
        const int edge = int(threadIdx.x) < middle.head ? threadIdx.x : middle.tail + threadIdx.x - middle.head;
        if (edge < width) store(row + edge, one);
    }
}

// cross_entropy, first half: losses = logsumexp(z) - z[target], 0 for a target of `ignore`, NaN for one that is not a column.
// Bytes: N V sizeof(T) read, 8 N written.
template <int V, class T>
__global__ void __launch_bounds__(MOST) cross_entropy(
    const T* __restrict__ logits, const int* targets, float* losses, float* logsumexp, int ignore, int n_rows, int width
) {
    __shared__ Online shared[MOST_WARPS];
    const long long n = (long long)blockIdx.x * blockDim.y + threadIdx.y;
    if (n >= n_rows) return;  // the same for all threads of a row
    const T* row = logits + n * width;
    const float lse = logsumexp_of(row_merge(online_of<V>(row, middle_of<V>(n * width, width), width), shared));
    if (threadIdx.x) return;
    const int target = targets[n];
    logsumexp[n] = lse;
    losses[n] = target == ignore ? 0.0f : target >= 0 && target < width ? lse - to_float(row[target]) : nan();
}

// cross_entropy_backward: dlogits = dloss * (softmax(z) - onehot), 0 for a target of `ignore`, whose row is not read.
// Bytes: 2 N V sizeof(T).
template <class T, int V>
__global__ void __launch_bounds__(MOST) cross_entropy_backward(
    const float* dloss, const T* __restrict__ logits, const int* targets, const float* logsumexp, T* __restrict__ dlogits, int ignore,
    int n_rows, int width
) {
    const long long n = (long long)blockIdx.x * blockDim.y + threadIdx.y;
    if (n >= n_rows) return;
    const Middle middle = middle_of<V>(n * width, width);
    const int target = targets[n];
    if (target == ignore) fill_row<V>(dlogits + n * width, middle, width, 0.0f * *dloss);
    else differentiate_row<V>(logits + n * width, dlogits + n * width, middle, width, logsumexp[n], target, *dloss);
}

// head_loss: losses as above, and softmax(z) - onehot (0 where ignored) in place of z, for the products of the head's backward.
// A row is read the second time right after the first: the rows of all blocks together fit L2 up to about V = 100,000 in bf16.
// Bytes: 2 N V sizeof(T) where they fit, else 3.
template <class T, int V>
__global__ void __launch_bounds__(MOST) head_loss(T* inout_logits, const int* targets, float* losses, int ignore, int n_rows, int width) {
    __shared__ Online shared[MOST_WARPS];
    const long long n = (long long)blockIdx.x * blockDim.y + threadIdx.y;
    if (n >= n_rows) return;
    T* row = inout_logits + n * width;
    const Middle middle = middle_of<V>(n * width, width);
    const int target = targets[n];
    if (target == ignore) {  // the same for all threads of a row
        fill_row<V>(row, middle, width, 0.0f);
        if (threadIdx.x == 0) losses[n] = 0.0f;
        return;
    }
    const float lse = logsumexp_of(row_merge(online_of<V>(row, middle, width), shared));
    const float chosen = target >= 0 && target < width ? to_float(row[target]) : nan();
    __syncwarp();
    if (blockDim.x > WARP) __syncthreads();  // all have read z[target] before it is overwritten
    if (threadIdx.x == 0) losses[n] = lse - chosen;
    differentiate_row<V>(row, row, middle, width, lse, target, 1.0f);
}

// total_loss: the sum of N losses and the number of targets that are not `ignore`, by one block: each thread sums its stride in order, then a tree.
// Bytes: 8 N.   Grid: 1.
__global__ void __launch_bounds__(MOST) total_loss(const float* losses, const int* targets, float* total, float* count, int ignore, int n_rows) {
    __shared__ float sums[MOST_WARPS];
    __shared__ float counts[MOST_WARPS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float sum = 0.0f;
    int valid = 0;
#pragma unroll 4
    for (int n = threadIdx.x; n < n_rows; n += MOST) {
        sum += losses[n];
        valid += targets[n] != ignore;
    }
    sum = warp_sum(sum);
    const float some = warp_sum(float(valid));  // integers: exact up to 2^24
    if (lane == 0) {
        sums[warp] = sum;
        counts[warp] = some;
    }
    __syncthreads();
    if (warp) return;
    sum = warp_sum(sums[lane]);
    const float all = warp_sum(counts[lane]);
    if (lane == 0) {
        *total = sum;
        *count = all;
    }
}

// scaled: y = x * factor, with the factor on the device (dloss); y may be x, or another array.                  [P] <- [P], 0-d
// Bytes: 2 P sizeof(T).   Grid: ceil(P / V / block).
template <class T, int V>
__global__ void scaled(const T* x, T* y, const float* factor, long long count) {
    const long long first = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (count - first >= V) {
        float values[V];
        load(x + first, values);
#pragma unroll
        for (int i = 0; i < V; i++) values[i] *= *factor;
        store(y + first, values);
    } else {
        for (long long i = first; i < count; i++) y[i] = from_float<T>(to_float(x[i]) * *factor);
    }
}
