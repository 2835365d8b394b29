// What stands beside a dense product: a bias added to its rows, a result added to what is there, and the sums of columns (a bias's gradient).
// Grids and bytes stand with each kernel.   Defined in minimoe/reference/linear.py and, for `add_into`, by `accumulate` of the contract.
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
// One access a thread; what a last access has not whole is done one by one.   Bytes: 3 P sizeof(T).   Grid: ceil(P / V / block).
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

// column_sums: y[s] = sum of the rows of piece s of x, + what is there if `accumulate`                         [S,O] <- [N,O]
// Twice makes a bias's gradient: T -> float pieces of rows, then the pieces, float -> T, with S = 1. A block (columns, rows) has V columns a
// thread, each row of threads every blockDim.y-th row of the piece in order, and adds the rows of threads as a tree: one order for one shape.
// Bytes: N O sizeof(From) read.   Grid (pieces of O, S), blockDim.y a power of two, shared 4 V bytes a thread.
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
