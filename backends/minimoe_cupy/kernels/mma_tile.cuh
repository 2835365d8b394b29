// A tile of a bfloat16 product on the tensor cores (mma.sync m16n8k16), its operands copied in the background (cp.async) STAGES - 1 steps ahead.
//
// An operand is SPAN (of the result's rows, or columns) by the summed index K, STEP of which are a stage. It is K-major (K is contiguous in
// memory: a stage is [SPAN][STEP]) or MN-major (the span is contiguous: [STEP][SPAN], loaded transposed). Rows in shared memory are not
// padded: their 16-byte chunks are permuted so that eight rows' chunks of one column are in different banks.
// Elements outside of an operand are zero there. VECTOR: rows begin at multiples of 16 bytes; otherwise elements are loaded one by one, and
// stored where the copy would have put them.
#pragma once
#include "common.cuh"
#include "quotient.cuh"

constexpr int STEP = 32, STAGES = 4;

// Copies the first `count` of 8 elements (none if that is negative), and zeros after them. VECTOR: all or none.
template <bool VECTOR>
__device__ inline void copy_chunk(bf16* shared, const bf16* from, int count) {
    if constexpr (VECTOR) {
        copy_async(shared, from, count > 0);
    } else {
        unsigned words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const unsigned low = 2 * i < count ? from[2 * i].bits : 0, high = 2 * i + 1 < count ? from[2 * i + 1].bits : 0;
            words[i] = low | high << 16;
        }
        *reinterpret_cast<uint4*>(shared) = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// K-major: [SPAN][STEP]. `at(i)` returns the address of the i-th row of the span, or null outside.
template <int SPAN, int THREADS, bool VECTOR>
struct KMajor {
    static constexpr int ACROSS = STEP / CHUNK, DOWN = THREADS / ACROSS, PASSES = SPAN / DOWN, SIZE = SPAN * STEP;
    const bf16* row[PASSES];
    const bf16* somewhere;  // a valid address for copies of nothing
    int length;  // of the summed index

    template <class At>
    __device__ KMajor(const bf16* somewhere, int length, At at) : somewhere(somewhere), length(length) {
#pragma unroll
        for (int i = 0; i < PASSES; i++) row[i] = at(threadIdx.x / ACROSS + i * DOWN);
    }

    __device__ static int offset(int row, int chunk) { return row * STEP + ((chunk ^ row / 2) & 3) * CHUNK; }

    __device__ void copy(bf16* shared, int step) {
        const int chunk = threadIdx.x % ACROSS, k = step * STEP + chunk * CHUNK;
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            const bool inside = row[i] && k < length;
            copy_chunk<VECTOR>(shared + offset(threadIdx.x / ACROSS + i * DOWN, chunk), inside ? row[i] + k : somewhere, inside ? length - k : 0);
        }
    }

    // As mma's a: 16 of the span from m by 16 of the sum from k.
    __device__ static void left(unsigned (&a)[4], const bf16* shared, int m, int k, int lane) {
        ldmatrix_x4(a, shared + offset(m + lane % 16, k / CHUNK + lane / 16));
    }

    // As mma's b, twice: 16 of the sum from k by 16 of the span from n.
    __device__ static void right(unsigned (&b)[4], const bf16* shared, int n, int k, int lane) {
        ldmatrix_x4(b, shared + offset(n + lane % 8 + lane / 16 * 8, k / CHUNK + lane / 8 % 2));
    }
};

// MN-major: [STEP][SPAN]. Rows are `stride` apart, or those that `order` names: token.of(order[k]). `width` elements of a row are inside.
template <int SPAN, int THREADS, bool VECTOR, bool GATHER = false>
struct MNMajor {
    static constexpr int ACROSS = SPAN / CHUNK, DOWN = THREADS / ACROSS, PASSES = STEP / DOWN, SIZE = SPAN * STEP;
    const bf16* from;  // of the span's first
    long long stride;
    int width, length;
    const int* order;
    Quotient token;  // of a number in `order`
    int next[GATHER ? PASSES : 1];  // the rows of the next step, read a step ahead

    __device__ MNMajor(const bf16* from, long long stride, int width, int length, const int* order = nullptr, Quotient token = {})
        : from(from), stride(stride), width(width), length(length), order(order), token(token) {
        look_up(0);
    }

    __device__ static int offset(int k, int chunk) { return k * SPAN + ((chunk & ~7) | ((chunk ^ k) & 7)) * CHUNK; }

    __device__ void look_up(int step) {
        if constexpr (GATHER) {
#pragma unroll
            for (int i = 0; i < PASSES; i++) {
                const int k = step * STEP + threadIdx.x / ACROSS + i * DOWN;
                next[i] = k < length ? token.of(order[k]) : 0;
            }
        }
    }

    __device__ void copy(bf16* shared, int step) {
        const int chunk = threadIdx.x % ACROSS;
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            const int down = threadIdx.x / ACROSS + i * DOWN, k = step * STEP + down, count = k < length ? width - chunk * CHUNK : 0;
            long long row = k;
            if constexpr (GATHER) row = next[i];
            copy_chunk<VECTOR>(shared + offset(down, chunk), count > 0 ? from + row * stride + chunk * CHUNK : from, count);
        }
        look_up(step + 1);
    }

    __device__ static void left(unsigned (&a)[4], const bf16* shared, int m, int k, int lane) {
        ldmatrix_x4_transposed(a, shared + offset(k + lane % 8 + lane / 16 * 8, m / CHUNK + lane / 8 % 2));
    }

    __device__ static void right(unsigned (&b)[4], const bf16* shared, int n, int k, int lane) {
        ldmatrix_x4_transposed(b, shared + offset(k + lane % 16, n / CHUNK + lane / 16));
    }
};

// The sums of a warp: WM x WN of the tile, from (m, n); sum[i][j] is mma's c of 16 x 8. Fragments are loaded a step of 16 ahead.
template <int WM, int WN>
struct Warp {
    static constexpr int DOWN = WM / 16, ACROSS = WN / 8;
    float sum[DOWN][ACROSS][4];
    unsigned a[2][DOWN][4], b[2][ACROSS / 2][4];

    template <class A, class B>
    __device__ void load(int which, const bf16* shared, int m, int n, int k, int lane) {
#pragma unroll
        for (int i = 0; i < DOWN; i++) A::left(a[which][i], shared, m + 16 * i, k, lane);
#pragma unroll
        for (int j = 0; j < ACROSS / 2; j++) B::right(b[which][j], shared + A::SIZE, n + 16 * j, k, lane);
    }

    __device__ void multiply(int which) {
#pragma unroll
        for (int i = 0; i < DOWN; i++) {
#pragma unroll
            for (int j = 0; j < ACROSS; j++) {
                const unsigned(&four)[4] = b[which][j / 2];
                const unsigned two[2] = {four[j % 2 * 2], four[j % 2 * 2 + 1]};
                mma_bf16(sum[i][j], a[which][i], two);
            }
        }
    }

    // sum += A B over the summed index, in its order. `shared`: STAGES * (A::SIZE + B::SIZE).
    template <class A, class B>
    __device__ void product(A& first, B& second, int length, bf16* shared, int m, int n) {
        constexpr int SIZE = A::SIZE + B::SIZE;
        const int lane = threadIdx.x % WARP, steps = (length + STEP - 1) / STEP;
#pragma unroll
        for (int i = 0; i < DOWN; i++)
#pragma unroll
            for (int j = 0; j < ACROSS; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) sum[i][j][c] = 0.0f;
        if (!steps) return;
        for (int step = 0; step < STAGES - 1; step++) {
            if (step < steps) {
                first.copy(shared + step * SIZE, step);
                second.copy(shared + step * SIZE + A::SIZE, step);
            }
            commit_copies();
        }
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        load<A, B>(0, shared, m, n, 0, lane);
        int here = 0, free = STAGES - 1;  // the stage that is multiplied, the one that is filled
        for (int step = 0; step < steps; step++) {
            load<A, B>(1, shared + here * SIZE, m, n, 16, lane);
            if (step + STAGES - 1 < steps) {
                first.copy(shared + free * SIZE, step + STAGES - 1);
                second.copy(shared + free * SIZE + A::SIZE, step + STAGES - 1);
            }
            commit_copies();
            multiply(0);
            free = here;
            here = here + 1 < STAGES ? here + 1 : 0;
            wait_for_copies<STAGES - 2>();  // the next stage is there
            __syncthreads();  // for all, and all have loaded the whole of this one
            if (step + 1 < steps) load<A, B>(0, shared + here * SIZE, m, n, 0, lane);
            multiply(1);
        }
    }
};
