// A tile of a float32 product, on the ordinary multipliers: BM x BN by TX x TY threads, each with TM rows by 4 + 4 columns (from the tile's
// two halves).
//
// Both operands are MN-major in shared memory, [STEP][SPAN + 4], where SPAN are the result's rows or columns: threads read 4 neighbours of the
// span at once. In global memory an operand is K-major (the summed index is contiguous; transposed on its way) or MN-major (the span is
// contiguous). A step's elements wait in registers while the previous step is multiplied; with two buffers a step takes one barrier.
// Elements outside of an operand are zero there. VECTOR: rows begin at multiples of 16 bytes.
#pragma once
#include "common.cuh"
#include "quotient.cuh"

constexpr int STEP = 8, QUAD = 4;

// Loads `count` of 4 elements (none if that is negative), and zeros after them.
template <bool VECTOR>
__device__ inline void fetch_quad(const float* from, float (&to)[QUAD], int count) {
    if constexpr (VECTOR) {
        if (count > 0) {
            load(from, to);
            return;
        }
    }
#pragma unroll
    for (int i = 0; i < QUAD; i++) to[i] = !VECTOR && i < count ? from[i] : 0.0f;
}

// K-major: [SPAN][k]. `at(i)` returns the address of the i-th row of the span, or null outside.
template <int SPAN, int THREADS, bool VECTOR>
struct KMajor {
    static constexpr int ACROSS = STEP / QUAD, DOWN = THREADS / ACROSS, PASSES = SPAN / DOWN, WIDTH = SPAN + QUAD;
    const float* row[PASSES];
    int length;  // of the summed index
    float held[PASSES][QUAD];

    template <class At>
    __device__ KMajor(int length, At at) : length(length) {
#pragma unroll
        for (int i = 0; i < PASSES; i++) row[i] = at(threadIdx.x / ACROSS + i * DOWN);
    }

    __device__ void fetch(int step) {
        const int k = step * STEP + threadIdx.x % ACROSS * QUAD;
#pragma unroll
        for (int i = 0; i < PASSES; i++) fetch_quad<VECTOR>(row[i] + k, held[i], row[i] ? length - k : 0);
    }

    __device__ void keep(float* shared) const {
        float* to = shared + threadIdx.x % ACROSS * QUAD * WIDTH + threadIdx.x / ACROSS;
#pragma unroll
        for (int i = 0; i < PASSES; i++)
#pragma unroll
            for (int j = 0; j < QUAD; j++) to[j * WIDTH + i * DOWN] = held[i][j];
    }
};

// MN-major: [k][SPAN]. Rows are `stride` apart, or (GATHER) those that `order` names: token.of(order[k]). `width` elements of a row are inside.
template <int SPAN, int THREADS, bool VECTOR, bool GATHER = false>
struct MNMajor {
    static constexpr int ACROSS = SPAN / QUAD, DOWN = THREADS / ACROSS, WIDTH = SPAN + QUAD;
    static_assert(DOWN == STEP, "one pass a step");
    const float* from;  // this thread's: the first of its quad, and of its row unless rows are gathered
    int stride;
    int count, length;  // of the quad's elements inside; of rows from this thread's first on
    const int* order;
    Quotient token;  // of a number in `order`
    float held[QUAD];

    __device__ MNMajor(const float* begin, int stride, int width, int length, const int* order = nullptr, Quotient token = {})
        : stride(stride), length(length - int(threadIdx.x) / ACROSS), token(token) {
        const int down = threadIdx.x / ACROSS, column = threadIdx.x % ACROSS * QUAD;
        from = begin + column + (GATHER ? 0 : (long long)down * stride);
        count = width - column;
        this->order = GATHER ? order + down : nullptr;
    }

    __device__ void fetch(int step) {
        const int k = step * STEP, inside = k < length ? count : 0;
        long long row = k;
        if constexpr (GATHER) row = inside > 0 ? token.of(order[k]) : 0;
        fetch_quad<VECTOR>(from + row * stride, held, inside);
    }

    __device__ void keep(float* shared) const {
        float* to = shared + threadIdx.x / ACROSS * WIDTH + threadIdx.x % ACROSS * QUAD;
        *reinterpret_cast<float4*>(to) = make_float4(held[0], held[1], held[2], held[3]);
    }
};

// The sums of a thread: rows ty * TM .., columns tx * 4 .. of the tile's left half, then of its right half.
template <int BM, int BN, int TM>
struct Sums {
    static constexpr int TX = BN / 8, SIZE = STEP * (BM + BN + 2 * QUAD);
    float sum[TM][2][QUAD];

    // sum += A B over the summed index, in its order, one fused multiply-add each. `shared`: two buffers of SIZE.
    template <class A, class B>
    __device__ void product(A& first, B& second, int length, float (&shared)[2][SIZE]) {
        const int tx = threadIdx.x % TX, ty = threadIdx.x / TX, steps = (length + STEP - 1) / STEP;
#pragma unroll
        for (int i = 0; i < TM; i++)
#pragma unroll
            for (int j = 0; j < 2 * QUAD; j++) sum[i][j / QUAD][j % QUAD] = 0.0f;
        if (!steps) return;
        first.fetch(0);
        second.fetch(0);
        for (int step = 0; step < steps; step++) {
            float *a = shared[step % 2], *b = a + STEP * A::WIDTH;
            first.keep(a);
            second.keep(b);
            if (step + 1 < steps) {
                first.fetch(step + 1);
                second.fetch(step + 1);
            }
            __syncthreads();  // this buffer is full, and the other one read by all
#pragma unroll
            for (int k = 0; k < STEP; k++) {
                float left[TM], right[2][QUAD];
#pragma unroll
                for (int i = 0; i < TM; i += QUAD) read(a + k * A::WIDTH + ty * TM + i, left[i], left[i + 1], left[i + 2], left[i + 3]);
#pragma unroll
                for (int h = 0; h < 2; h++)
                    read(b + k * B::WIDTH + h * BN / 2 + tx * QUAD, right[h][0], right[h][1], right[h][2], right[h][3]);
#pragma unroll
                for (int i = 0; i < TM; i++)
#pragma unroll
                    for (int h = 0; h < 2; h++)
#pragma unroll
                        for (int j = 0; j < QUAD; j++) sum[i][h][j] = fmaf(left[i], right[h][j], sum[i][h][j]);
            }
        }
    }

    __device__ static void read(const float* from, float& x, float& y, float& z, float& w) {
        const float4 four = *reinterpret_cast<const float4*>(from);
        x = four.x, y = four.y, z = four.z, w = four.w;
    }
};
