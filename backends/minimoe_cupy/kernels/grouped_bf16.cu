// Grouped products in bfloat16 with float32 sums, on the tensor cores: rows are sorted by expert, and `offsets` [E+1] bound each expert's rows.
//
// grouped_rows_bf16: y[r] = W_e a[r] or W_e^T a[r], with bias and activation as PRODUCT says (grouped_finish.cuh).
//   a [R,K], or rows order[r] / slots of it where `order` is given; weight [E,N,K], transposed [E,K,N]; `rows` R: unused rows become zeros,
//   0: they are not written. ACTIVATE of swiglu loads gate and up columns of the same outputs into each warp's tile.
//   Grid: row tiles * column tiles (tiles.cuh).   FLOPs: 2 R N K.   Bytes: R (K + N) 2, and the weights of experts that have rows.
// grouped_dw_bf16: dw[e] = left_e^T right_e, or added to it.   left [R,M], right [R,N] (or rows order[r] / slots of it, by quotient.cuh) -> dw [E,M,N] float32
//   Grid: E * row tiles * column tiles. An expert without rows gives zeros; rows of its neighbours are zeros in shared memory.
// Tiles: BM x BN = 128 x 256 by 8 warps of 64 x 64, one block per processor: what a warp loads from shared memory (64 + 64) and the block from
// L2 (128 + 256 per step) is little enough for mma.sync's rate; 64 x 64 by 4 warps of 32 x 32 where there are few large tiles.
// K is summed in order: equal inputs give equal bits.
// Reference: minimoe/reference/expert.py.   Unproven: no card has run it.
#include "grouped_chunks.cuh"
#include "mma_tile.cuh"
#include "tiles.cuh"

template <int BM>
constexpr int SIDE_OF = BM >= 128 ? 64 : 32;  // of a warp's tile

template <int BM, int BN>
constexpr int THREADS = BM / SIDE_OF<BM> * (BN / SIDE_OF<BM>)*WARP;

template <int BM, int BN>
constexpr int SHARED = 2 * STAGES * STEP * (BM + BN);  // bytes of shared memory

// Hand the sums of a warp, 16 rows after 16, to `take(row in the warp's tile, chunk of columns, the row's SIDE sums)`, one chunk per lane, for
// the first `chunks` of each row. ROLLED: one after the other, which needs fewer registers.
template <int SIDE, bool ROLLED = false, class Take>
__device__ inline void hand_over(const Warp<SIDE, SIDE>& warp, bf16* shared, int chunks, Take take) {
    constexpr int WIDTH = SIDE + PAD;
    const int lane = threadIdx.x % WARP;
    float* mine = reinterpret_cast<float*>(shared) + threadIdx.x / WARP * 16 * WIDTH;
    wait_for_copies<0>();
    __syncthreads();  // nobody reads operands any more
#pragma unroll
    for (int i = 0; i < SIDE / 16; i++) {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < SIDE / 8; j++) {
            float* to = mine + lane / 4 * WIDTH + 8 * j + lane % 4 * 2;
            *reinterpret_cast<float2*>(to) = make_float2(warp.sum[i][j][0], warp.sum[i][j][1]);
            *reinterpret_cast<float2*>(to + 8 * WIDTH) = make_float2(warp.sum[i][j][2], warp.sum[i][j][3]);
        }
        __syncwarp();
        if constexpr (ROLLED) {
#pragma unroll 1
            for (int c = lane; c < 16 * chunks; c += WARP) take(16 * i + c / chunks, c % chunks, mine + c / chunks * WIDTH);
        } else {
            for (int c = lane; c < 16 * chunks; c += WARP) take(16 * i + c / chunks, c % chunks, mine + c / chunks * WIDTH);
        }
    }
}

template <int BM, int BN, bool VECTOR, int PRODUCT>
__global__ void __launch_bounds__(THREADS<BM, BN>) grouped_rows_bf16(
    const bf16* a, const int* order, int slots, const bf16* weight, const bf16* bias, const int* offsets, const bf16* pre_activation, bf16* y,
    bf16* hidden, int rows, int n_experts, int depth, int width, int row_tiles, int column_tiles, int kind, float limit
) {
    extern __shared__ unsigned char dynamic_shared[];
    constexpr int SIDE = SIDE_OF<BM>, ACROSS = BN / SIDE;
    const TileIndex index = tile_index(blockIdx.x, row_tiles, column_tiles);
    const Tile tile = find_tile<BM>(offsets, n_experts, rows, index.row);
    if (tile.expert < 0) return;
    const bool unused = tile.expert == n_experts, gated = PRODUCT == ACTIVATE && kind == SWIGLU;
    const int halves = gated ? 2 : 1, begin = index.column * (BN / halves), length = unused ? 0 : depth;
    const long long expert = unused ? 0 : tile.expert;
    bf16* shared = reinterpret_cast<bf16*>(dynamic_shared);
    const int m = threadIdx.x / WARP / ACROSS * SIDE, n = threadIdx.x / WARP % ACROSS * SIDE;

    KMajor<BM, THREADS<BM, BN>, VECTOR> left(a, length, [&](int i) -> const bf16* {
        const int row = tile.first + i;
        if (row >= tile.last || unused) return nullptr;
        return a + (long long)(order ? order[row] / slots : row) * depth;
    });
    const bf16* matrix = weight + expert * depth * width * halves;
    Warp<SIDE, SIDE> warp;
    if constexpr (PRODUCT == FORWARD || PRODUCT == ACTIVATE) {
        KMajor<BN, THREADS<BM, BN>, VECTOR> right(weight, length, [&](int j) -> const bf16* {
            // gated: half of a warp's columns are gates, the other half the same columns of up
            const int side = SIDE / halves, within = j % SIDE, half = within / side;
            const int column = begin + j / SIDE * side + within % side;
            return column < width ? matrix + ((long long)half * width + column) * depth : nullptr;
        });
        warp.product(left, right, length, shared, m, n);
    } else {
        MNMajor<BN, THREADS<BM, BN>, VECTOR> right(matrix + begin, width, width - begin, length);
        warp.product(left, right, length, shared, m, n);
    }

    const Finish<bf16> finish = {bias && !unused ? bias + expert * width * halves : nullptr, pre_activation, y, hidden, width, kind, limit};
    hand_over<SIDE>(warp, shared, SIDE / CHUNK / halves, [&](int down, int chunk, const float* sums) {
        const int row = tile.first + m + down, column = begin + n / halves + chunk * CHUNK;
        if (row < tile.last && column < width) finish_chunk<VECTOR, PRODUCT>(finish, row, column, sums, chunk, chunk + SIDE / CHUNK / 2);
    });
}

// Small tiles: three blocks per processor, since four would leave too few registers for rows that are gathered element by element.
template <int BM, int BN, bool VECTOR, bool GATHER>
__global__ void __launch_bounds__(THREADS<BM, BN>, BM >= 128 ? 1 : 3) grouped_dw_bf16(
    const bf16* left, const bf16* right, const int* order, unsigned factor, int shift, const int* offsets, float* dw, int height, int width,
    int row_tiles, int column_tiles, bool accumulate
) {
    extern __shared__ unsigned char dynamic_shared[];
    constexpr int SIDE = SIDE_OF<BM>, ACROSS = BN / SIDE;
    const int tiles = row_tiles * column_tiles, expert = blockIdx.x / tiles;
    const TileIndex index = tile_index(blockIdx.x % tiles, row_tiles, column_tiles);
    const int first = offsets[expert], length = offsets[expert + 1] - first;
    const int top = index.row * BM, begin = index.column * BN;
    const int m = threadIdx.x / WARP / ACROSS * SIDE, n = threadIdx.x / WARP % ACROSS * SIDE;
    bf16* shared = reinterpret_cast<bf16*>(dynamic_shared);
    if (accumulate && !length) return;

    Warp<SIDE, SIDE> warp;
    MNMajor<BM, THREADS<BM, BN>, VECTOR> rows(left + (long long)first * height + top, height, height - top, length);
    const bf16* from = right + (GATHER ? 0 : (long long)first * width) + begin;
    MNMajor<BN, THREADS<BM, BN>, VECTOR, GATHER> columns(from, width, width - begin, length, GATHER ? order + first : nullptr, {factor, shift});
    warp.product(rows, columns, length, shared, m, n);
    hand_over<SIDE, true>(warp, shared, SIDE / QUAD, [&](int down, int quad, const float* sums) {
        const int row = top + m + down, column = begin + n + quad * QUAD;
        if (row < height && column < width)
            store_quad<VECTOR>(dw + ((long long)expert * height + row) * width + column, sums, quad, width - column, accumulate);
    });
}
