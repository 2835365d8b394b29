// The grouped products of grouped_bf16.cu for Hopper: the same rows, weights and results, by wgmma (wgmma_tile.cuh), in large tiles only.
//
// grouped_rows_wgmma: y[r] = W_e a[r] or W_e^T a[r], with bias and activation as PRODUCT says (grouped_finish.cuh).
//   a [R,K], or rows order[r] / slots of it where `order` is given; weight [E,N,K], transposed [E,K,N]; `rows` R: unused rows become zeros,
//   0: they are not written. ACTIVATE of swiglu: half of a tile's columns are gates, the other half the same columns of up.
//   Grid: row tiles * column tiles (tiles.cuh).   FLOPs: 2 R N K.   Bytes: R (K + N) 2, and the weights of experts that have rows.
// grouped_dw_wgmma: dw[e] = left_e^T right_e, or added to it.   left [R,M], right [R,N] (or rows order[r] / slots of it, by quotient.cuh) -> dw [E,M,N] float32
//   Grid: E * row tiles * column tiles. An expert without rows gives zeros; rows of its neighbours are zeros in shared memory.
// Tiles: 128 x 256 or 128 x 128 by three warpgroups, one block per processor. K is summed in order: equal inputs give equal bits. Rows of all
// arrays begin at multiples of 16 bytes.   Compiles only for sm_90a.
// Reference: minimoe/reference/expert.py.   Unproven: no card has run it.
#include "grouped_chunks.cuh"
#include "tiles.cuh"
#include "wgmma_tile.cuh"

template <int BN, int PRODUCT>
__global__ void __launch_bounds__(THREADS, 1) grouped_rows_wgmma(
    const bf16* a, const int* order, int slots, const bf16* weight, const bf16* bias, const int* offsets, const bf16* pre_activation, bf16* y,
    bf16* hidden, int rows, int n_experts, int depth, int width, int row_tiles, int column_tiles, int kind, float limit
) {
    extern __shared__ __align__(1024) unsigned char dynamic_shared[];
    bf16* shared = reinterpret_cast<bf16*>(dynamic_shared);
    Barriers& barriers = *reinterpret_cast<Barriers*>(shared + STAGES * (HEIGHT + BN) * STEP);
    const TileIndex index = tile_index(blockIdx.x, row_tiles, column_tiles);
    const Tile tile = find_tile<HEIGHT>(offsets, n_experts, rows, index.row);
    if (tile.expert < 0) return;
    const bool unused = tile.expert == n_experts, gated = PRODUCT == ACTIVATE && kind == SWIGLU;
    const int halves = gated ? 2 : 1, side = BN / halves, begin = index.column * side, steps = unused ? 0 : (depth + STEP - 1) / STEP;
    const long long expert = unused ? 0 : tile.expert;
    prepare(barriers);

    if (threadIdx.x >= MULTIPLIERS) {
        KMajor<HEIGHT> left(a, depth, [&](int i) -> const bf16* {
            const int row = tile.first + i;
            if (row >= tile.last || unused) return nullptr;
            return a + (long long)(order ? order[row] / slots : row) * depth;
        });
        const bf16* matrix = weight + expert * depth * width * halves;
        if constexpr (PRODUCT == FORWARD || PRODUCT == ACTIVATE) {
            KMajor<BN> right(weight, depth, [&](int j) -> const bf16* {
                const int half = j / side, column = begin + j % side;
                return column < width ? matrix + ((long long)half * width + column) * depth : nullptr;
            });
            fill(left, right, steps, shared, barriers);
        } else {
            MNMajor<BN> right(matrix + begin, width, width - begin, depth);
            fill(left, right, steps, shared, barriers);
        }
        return;
    }

    float sum[BN / 2];
    if constexpr (PRODUCT == FORWARD || PRODUCT == ACTIVATE) multiply<KMajor<HEIGHT>, KMajor<BN>, BN>(sum, steps, shared, barriers);
    else multiply<KMajor<HEIGHT>, MNMajor<BN>, BN>(sum, steps, shared, barriers);
    const Finish<bf16> finish = {bias && !unused ? bias + expert * width * halves : nullptr, pre_activation, y, hidden, width, kind, limit};
    hand_over<BN>(sum, dynamic_shared, barriers, side / CHUNK, [&](int down, int chunk, const float* sums) {
        const int row = tile.first + down, column = begin + chunk * CHUNK;
        if (row < tile.last && column < width) finish_chunk<true, PRODUCT>(finish, row, column, sums, chunk, chunk + side / CHUNK);
    });
}

template <int BN, bool GATHER>
__global__ void __launch_bounds__(THREADS, 1) grouped_dw_wgmma(
    const bf16* left, const bf16* right, const int* order, unsigned factor, int shift, const int* offsets, float* dw, int height, int width,
    int row_tiles, int column_tiles, bool accumulate
) {
    extern __shared__ __align__(1024) unsigned char dynamic_shared[];
    bf16* shared = reinterpret_cast<bf16*>(dynamic_shared);
    Barriers& barriers = *reinterpret_cast<Barriers*>(shared + STAGES * (HEIGHT + BN) * STEP);
    const int tiles = row_tiles * column_tiles, expert = blockIdx.x / tiles;
    const TileIndex index = tile_index(blockIdx.x % tiles, row_tiles, column_tiles);
    const int first = offsets[expert], length = offsets[expert + 1] - first, steps = (length + STEP - 1) / STEP;
    const int top = index.row * HEIGHT, begin = index.column * BN;
    if (accumulate && !length) return;
    prepare(barriers);

    if (threadIdx.x >= MULTIPLIERS) {
        MNMajor<HEIGHT> rows(left + (long long)first * height + top, height, height - top, length);
        const bf16* from = right + (GATHER ? 0 : (long long)first * width) + begin;
        MNMajor<BN, GATHER> columns(from, width, width - begin, length, GATHER ? order + first : nullptr, {factor, shift});
        fill(rows, columns, steps, shared, barriers);
        return;
    }

    float sum[BN / 2];
    multiply<MNMajor<HEIGHT>, MNMajor<BN, GATHER>, BN>(sum, steps, shared, barriers);
    hand_over<BN>(sum, dynamic_shared, barriers, BN / QUAD, [&](int down, int quad, const float* sums) {
        const int row = top + down, column = begin + quad * QUAD;
        if (row < height && column < width)
            store_quad<true>(dw + ((long long)expert * height + row) * width + column, sums, quad, width - column, accumulate);
    });
}
