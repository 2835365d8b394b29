// A row in the registers of the threads that share it, and sums over those threads.
//
// blockDim.x threads share a row: a power of two up to a warp, or several warps, which then are the whole block. Each keeps HELD accesses of V
// neighbours as they are in memory (bf16 in half a register), so that a row is loaded once. HELD = 0: the row is too long for registers and is
// loaded again each time, from a cache if that is soon.
#pragma once
#include "common.cuh"

constexpr int MOST_WARPS = 32;  // of a block, at most

// V neighbours as they are in memory.
template <class T, int V>
struct Access {
    uint4 words;

    __device__ void read(const T* from) { words = *reinterpret_cast<const uint4*>(from); }
    __device__ void set(const float (&from)[V]) {
        const T* type = nullptr;
        words = make_uint4(pack(from, 0, type), pack(from, 1, type), pack(from, 2, type), pack(from, 3, type));
    }
    __device__ void get(float (&to)[V]) const {
        const T* type = nullptr;
        unpack(words.x, to, 0, type);
        unpack(words.y, to, 1, type);
        unpack(words.z, to, 2, type);
        unpack(words.w, to, 3, type);
    }
};

template <class T>
struct Access<T, 1> {
    T value;

    __device__ void read(const T* from) { value = *from; }
    __device__ void set(const float (&from)[1]) { value = from_float<T>(from[0]); }
    __device__ void get(float (&to)[1]) const { to[0] = to_float(value); }
};

// visit(which access, its first column) for each access that a thread has of a row of so many columns.
template <int V, int HELD, class Visit>
__device__ inline void over_row(int width, Visit visit) {
    if constexpr (HELD) {
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int column = (i * int(blockDim.x) + int(threadIdx.x)) * V;
            if (column < width) visit(i, column);
        }
    } else {
        for (int column = int(threadIdx.x) * V; column < width; column += int(blockDim.x) * V) visit(0, column);
    }
}

template <class T, int V, int HELD>
struct Row {
    Access<T, V> held[HELD];

    __device__ Row(const T* from, int width) {
        over_row<V, HELD>(width, [&](int i, int column) { held[i].read(from + column); });
    }
    __device__ void get(int i, int, float (&to)[V]) const { held[i].get(to); }

    // Adds another row, rounds the sum to T, keeps it and stores it.
    __device__ void add(const T* other, T* sum, int width) {
        const Row more(other, width);
        over_row<V, HELD>(width, [&](int i, int column) {
            float values[V], delta[V];
            held[i].get(values);
            more.held[i].get(delta);
#pragma unroll
            for (int j = 0; j < V; j++) values[j] += delta[j];
            store(sum + column, values);
            held[i].set(values);
        });
    }
};

template <class T, int V>
struct Row<T, V, 0> {
    const T* from;

    __device__ Row(const T* from, int) : from(from) {}
    __device__ void get(int, int column, float (&to)[V]) const { load(from + column, to); }

    __device__ void add(const T* other, T* sum, int width) {
        over_row<V, 0>(width, [&](int, int column) {
            float values[V], delta[V];
            load(from + column, values);
            load(other + column, delta);
#pragma unroll
            for (int j = 0; j < V; j++) values[j] += delta[j];
            store(sum + column, values);
        });
        from = sum;  // each thread reads there what it wrote itself
    }
};

// COUNT sums over the threads of a row, as trees; all of them get the same bits. All threads of the block call this; if a row is more than a warp,
// `shared` may be written again after one more barrier of the block.
template <int COUNT>
__device__ inline void row_sum(float (&values)[COUNT], float (&shared)[COUNT][MOST_WARPS]) {
#pragma unroll
    for (int c = 0; c < COUNT; c++) {
#pragma unroll
        for (int offset = WARP / 2; offset; offset /= 2)
            if (offset < blockDim.x) values[c] += __shfl_xor_sync(ALL_LANES, values[c], offset);
    }
    if (blockDim.x <= WARP) return;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int c = 0; c < COUNT; c++)
        if (lane == 0) shared[c][warp] = values[c];
    __syncthreads();
#pragma unroll
    for (int c = 0; c < COUNT; c++) values[c] = warp_sum(lane < blockDim.x / WARP ? shared[c][lane] : 0.0f);
}

// to[column] = the sums that the block's rows of threads have of it, added in their order; each thread has V neighbours, `first` those of the
// block's first thread. `shared`: V floats a thread.
template <int V>
__device__ inline void sum_over_rows(const float (&sum)[V], float* shared, float* to, int first, int width) {
    const int thread = threadIdx.y * blockDim.x + threadIdx.x, across = blockDim.x * V;
    __syncthreads();  // the previous contents have been read
#pragma unroll
    for (int j = 0; j < V; j++) shared[thread * V + j] = sum[j];
    __syncthreads();
    for (int c = thread; c < across && first + c < width; c += blockDim.x * blockDim.y) {
        float total = shared[c];
        for (int y = 1; y < blockDim.y; y++) total += shared[y * across + c];
        to[first + c] = total;
    }
}
