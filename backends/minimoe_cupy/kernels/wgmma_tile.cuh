// A tile of a bfloat16 product on Hopper's tensor cores: 128 rows by BN columns, by two warpgroups that multiply (wgmma m64nBNk16, 64 rows
// each, their sums in registers) and a third that copies their operands (cp.async) up to STAGES steps ahead.
//
// An operand is SPAN (of the result's rows, or columns) by the summed index K, STEP of which are a stage. It is K-major (K is contiguous in
// global memory) or MN-major (the span is). Shared memory keeps that order, in pieces of 64 rows of 128 bytes: rows of the span if K-major; if
// MN-major rows of K, one piece for every 64 of the span. The 16-byte chunks of a row are permuted by the row's number modulo 8: this is the
// 128-byte swizzle that descriptors name, in which neither the copies nor wgmma have bank conflicts.
// Rows of either kind begin at multiples of 16 bytes; elements outside of an operand are zero in shared memory.
//
// Two mbarriers hand a stage back and forth. `full`: the four copying warps have seen their copies arrive, DEPTH steps after they issued
// them, and made them visible to the tensor cores. `empty`: the eight multiplying warps have waited for the products that read the stage.
#pragma once
#include "ptx_hopper.cuh"

#include "common.cuh"
#include "quotient.cuh"

constexpr int GROUP = 4 * WARP;  // a warpgroup
constexpr int HEIGHT = 128, THREADS = 3 * GROUP, MULTIPLIERS = 2 * GROUP;
constexpr int STEP = 64, STAGES = 4, DEPTH = 2;
constexpr int ROW_BYTES = 128, EIGHT_ROWS = 8 * ROW_BYTES, PIECE = 64 * STEP, PIECE_BYTES = 64 * ROW_BYTES;
constexpr int NO_LEADING = 16;  // bytes: 1 in its field, as CUTLASS writes it where the layout has no leading offset
constexpr int CHUNKS = STEP / CHUNK, DOWN = GROUP / CHUNKS;  // of a row; rows that a warpgroup copies at a time

struct Barriers {
    mbarrier full[STAGES], empty[STAGES], end;
};

template <int BN>
constexpr int SHARED = 2 * STAGES * STEP * (HEIGHT + BN) + 8 * (2 * STAGES + 1);  // bytes of shared memory: operands, then Barriers

__device__ inline void prepare(Barriers& barriers) {
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            mbarrier_init(&barriers.full[stage], GROUP / WARP);
            mbarrier_init(&barriers.empty[stage], MULTIPLIERS / WARP);
        }
        mbarrier_init(&barriers.end, MULTIPLIERS / WARP);
    }
    __syncthreads();
}

__device__ inline void warp_arrives(mbarrier* barrier) {
    __syncwarp();
    if (threadIdx.x % WARP == 0) mbarrier_arrive(barrier);
}

// The offset of this thread's chunk in the first rows that it copies, and, as DOWN is a multiple of 8, in the others.
__device__ inline int first_offset() {
    const int chunk = threadIdx.x % CHUNKS, row = threadIdx.x % GROUP / CHUNKS;
    return row * STEP + (chunk ^ row % 8) * CHUNK;
}

// K-major: rows of the span. `at(i)` returns the address of the i-th, or null outside.
template <int SPAN>
struct KMajor {
    static constexpr int SIZE = SPAN * STEP, MN_MAJOR = 0, PASSES = SPAN / DOWN;
    static constexpr int SIXTEEN = 16 * sizeof(bf16);  // bytes from 16 of K to the next
    const bf16* row[PASSES];
    const bf16* somewhere;  // a valid address for copies of nothing
    int length;  // of the summed index

    template <class At>
    __device__ KMajor(const bf16* somewhere, int length, At at) : somewhere(somewhere), length(length) {
#pragma unroll
        for (int i = 0; i < PASSES; i++) row[i] = at(threadIdx.x % GROUP / CHUNKS + i * DOWN);
    }

    __device__ void copy(bf16* shared, int step) {
        const int k = step * STEP + threadIdx.x % CHUNKS * CHUNK;
        bf16* to = shared + first_offset();
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            const bool inside = row[i] && k < length;
            copy_async(to + i * DOWN * STEP, inside ? row[i] + k : somewhere, inside);
        }
    }
};

// MN-major: rows of K, `stride` apart, or those that `order` names: token.of(order[k]). `width` elements of a row are inside.
template <int SPAN, bool GATHER = false>
struct MNMajor {
    static constexpr int SIZE = SPAN * STEP, MN_MAJOR = 1, PASSES = STEP / DOWN;
    static constexpr int SIXTEEN = 16 * ROW_BYTES;
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

    __device__ void look_up(int step) {
        if constexpr (GATHER) {
#pragma unroll
            for (int i = 0; i < PASSES; i++) {
                const int k = step * STEP + threadIdx.x % GROUP / CHUNKS + i * DOWN;
                next[i] = k < length ? token.of(order[k]) : 0;
            }
        }
    }

    __device__ void copy(bf16* shared, int step) {
        const int column = threadIdx.x % CHUNKS * CHUNK;
        bf16* to = shared + first_offset();
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            const int k = step * STEP + threadIdx.x % GROUP / CHUNKS + i * DOWN;
            const bf16* row = from + (GATHER ? next[i] : k) * stride + column;
#pragma unroll
            for (int piece = 0; piece < SPAN / 64; piece++) {
                const bool inside = k < length && column + 64 * piece < width;
                copy_async(to + piece * PIECE + i * DOWN * STEP, inside ? row + 64 * piece : from, inside);
            }
        }
        look_up(step + 1);
    }
};

// The work of the third warpgroup: copies `steps` stages of both operands.
template <class A, class B>
__device__ void fill(A& first, B& second, int steps, bf16* shared, Barriers& barriers) {
    for (int step = 0; step < steps + DEPTH; step++) {
        if (step < steps) {
            const int stage = step % STAGES;
            mbarrier_wait(&barriers.empty[stage], step / STAGES % 2 ^ 1);
            bf16* to = shared + stage * (A::SIZE + B::SIZE);
            first.copy(to, step);
            second.copy(to + A::SIZE, step);
        }
        commit_copies();
        if (step >= DEPTH) {
            wait_for_copies<DEPTH>();
            fence_proxy_async();
            warp_arrives(&barriers.full[(step - DEPTH) % STAGES]);
        }
    }
}

// The work of the other two: sum = A B for their 64 rows, K in its order. One step's products run while the next one's are issued. The first
// product overwrites: initial zeros would make the compiler wait for each product (its remark C7515).
template <class A, class B, int BN>
__device__ void multiply(float (&sum)[BN / 2], int steps, const bf16* shared, Barriers& barriers) {
    if (!steps) {
#pragma unroll
        for (int i = 0; i < BN / 2; i++) sum[i] = 0.0f;
        return;
    }
    constexpr int LEFT_LEADING = A::MN_MAJOR ? PIECE_BYTES : NO_LEADING, RIGHT_LEADING = B::MN_MAJOR ? PIECE_BYTES : NO_LEADING;
    const unsigned long long left = operand_descriptor(shared + threadIdx.x / GROUP * PIECE, LEFT_LEADING, EIGHT_ROWS);
    const unsigned long long right = operand_descriptor(shared + A::SIZE, RIGHT_LEADING, EIGHT_ROWS);
    for (int step = 0; step < steps; step++) {
        const int stage = step % STAGES, at = stage * (A::SIZE + B::SIZE) * int(sizeof(bf16));
        mbarrier_wait(&barriers.full[stage], step / STAGES % 2);
        wgmma_fence(sum);
#pragma unroll
        for (int k = 0; k < STEP / 16; k++)
            wgmma<A::MN_MAJOR, B::MN_MAJOR>(sum, further(left, at + k * A::SIXTEEN), further(right, at + k * B::SIXTEEN), step || k);
        wgmma_commit();
        wgmma_wait<1>(sum);  // for the step before
        if (step) warp_arrives(&barriers.empty[(step - 1) % STAGES]);
    }
    wgmma_wait<0>(sum);
}

// Hand the sums of a warp's 16 rows to `take(row in the tile, chunk of columns, the row's BN sums)`, one chunk per lane: the first `chunks` of
// each row.
template <int BN, class Take>
__device__ void hand_over(const float (&sum)[BN / 2], unsigned char* shared, Barriers& barriers, int chunks, Take take) {
    constexpr int WIDTH = BN + PAD;
    const int lane = threadIdx.x % WARP, top = threadIdx.x / WARP * 16;
    float* mine = reinterpret_cast<float*>(shared) + top * WIDTH;
    warp_arrives(&barriers.end);
    mbarrier_wait(&barriers.end, 0);  // nobody reads operands any more
#pragma unroll
    for (int j = 0; j < BN / 8; j++) {
        float* to = mine + lane / 4 * WIDTH + 8 * j + lane % 4 * 2;
        *reinterpret_cast<float2*>(to) = make_float2(sum[4 * j], sum[4 * j + 1]);
        *reinterpret_cast<float2*>(to + 8 * WIDTH) = make_float2(sum[4 * j + 2], sum[4 * j + 3]);
    }
    __syncwarp();
    for (int c = lane; c < 16 * chunks; c += WARP) take(top + c / chunks, c % chunks, mine + c / chunks * WIDTH);
}
