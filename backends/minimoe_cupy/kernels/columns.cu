// The operations beside a dense product: add_bias (y[n] += bias), add_into (y += x) and column_sums (the gradient of a bias).
// Shapes, order of sums, grid and bytes are given with each kernel.   Reference: minimoe/reference/linear.py; for add_into, `accumulate` of the
// kernel contract.   Unproven: no card has run it.
#include "common.cuh"

// add_bias: y[n] += bias, in place                                                                             [N,O] <- [N,O], [O]
// Each thread keeps V columns of the bias in registers and goes down the rows. Block (columns, rows), grid (pieces of O, pieces of N).
// Bytes: 2 N O sizeof(T).
template <class T, int V>
__global__ void add_bias(T* y, const T* __restrict__ bias, long long n_rows, int width) {
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (column >= width) return;
    float constant[V], values[V];
    load(bias + column, constant);
    for (long long n = (long long)blockIdx.y * blockDim.y + threadIdx.y; n < n_rows; n += (long long)gridDim.y * blockDim.y) {
        load(y + n * width + column, values);
#pragma unroll
        for (int i = 0; i < V; i++) values[i] += constant[i];
        store(y + n * width + column, values);
    }
}

// add_into: y += x, flat                                                                                       [P] <- [P], [P]
// One thread per access; an incomplete last access is done element by element.   Bytes: 3 P sizeof(T).   Grid: ceil(P / V / block).
template <class T, int V>
__global__ void add_into(T* y, const T* __restrict__ x, long long count) {
    const long long first = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (count - first >= V) {
        float sum[V], more[V];
        load(y + first, sum);
        load(x + first, more);
#pragma unroll
        for (int i = 0; i < V; i++) sum[i] += more[i];
        store(y + first, sum);
    } else {
        for (long long i = first; i < count; i++) y[i] = from_float<T>(to_float(y[i]) + to_float(x[i]));
    }
}

// column_sums: y[s] = sum of the rows of piece s of x, added to y if `accumulate`                              [S,O] <- [N,O]
// Two launches give the gradient of a bias: T -> float over pieces of rows, then float -> T over the pieces, with S = 1. In a block (columns,
// rows) a thread has V columns; each row of threads adds every blockDim.y-th row of the piece in order, then the rows of threads are added
// as a tree, so the shape fixes the order.
// Bytes: N O sizeof(From) read.   Grid (pieces of O, S), blockDim.y a power of two, shared 4 V bytes per thread.
template <int V, class From, class To>
__global__ void column_sums(const From* __restrict__ x, To* y, long long n_rows, int width, long long piece, bool accumulate) {
    extern __shared__ unsigned char dynamic_shared[];
    float(*sums)[V] = reinterpret_cast<float(*)[V]>(dynamic_shared);
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * V, thread = threadIdx.y * blockDim.x + threadIdx.x;
    const long long last = min(n_rows, (blockIdx.y + 1) * piece);
    float sum[V] = {};
    if (column < width) {
#pragma unroll 4
        for (long long n = blockIdx.y * piece + threadIdx.y; n < last; n += blockDim.y) {
            float values[V];
            load(x + n * width + column, values);
#pragma unroll
            for (int i = 0; i < V; i++) sum[i] += values[i];
        }
    }
#pragma unroll
    for (int i = 0; i < V; i++) sums[thread][i] = sum[i];
    for (int half = blockDim.y / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.y < half) {
#pragma unroll
            for (int i = 0; i < V; i++) sums[thread][i] += sums[thread + half * blockDim.x][i];
        }
    }
    if (threadIdx.y == 0 && column < width) {
        To* place = y + (long long)blockIdx.y * width + column;
#pragma unroll
        for (int i = 0; i < V; i++) place[i] = from_float<To>(sums[thread][i] + (accumulate ? to_float(place[i]) : 0.0f));
    }
}
