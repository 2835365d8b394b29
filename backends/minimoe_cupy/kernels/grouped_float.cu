// Grouped products in float32: rows are sorted by expert, and `offsets` [E+1] bound each expert's rows.
//
// grouped_rows_float: y[r] = W_e a[r] or W_e^T a[r], with bias and activation as PRODUCT says (grouped_finish.cuh).
//   a [R,K], or rows order[r] / slots of it where `order` is given; weight [E,N,K], transposed [E,K,N]; `rows` R: unused rows become zeros,
//   0: they are not written. ACTIVATE of swiglu loads gate columns into the left half of a tile and up columns into the right half.
//   Grid: row tiles * column tiles (tiles.cuh).   FLOPs: 2 R N K.   Bytes: R (K + N) 4, and the weights of experts that have rows.
// grouped_dw_float: dw[e] = left_e^T right_e, or added to it.   left [R,M], right [R,N] (or rows order[r] / slots of it, by quotient.cuh) -> dw [E,M,N]
//   Grid: E * row tiles * column tiles. An expert without rows gives zeros.
// Tiles: BM x BN = 128 x 128 by 256 threads of 8 x 8 sums, or 64 x 64 by 128 threads of 4 x 8 where there are few large ones.
// K is summed in order, in fused multiply-adds: equal inputs give equal bits.
// Reference: minimoe/reference/expert.py.   Unproven: no card has run it.
#include "float_tile.cuh"
#include "grouped_finish.cuh"
#include "tiles.cuh"

template <int BM>
constexpr int TALL = BM >= 128 ? 8 : 4;  // rows of a thread

template <int BM, int BN>
constexpr int THREADS = BM / TALL<BM> * BN / 8;

template <int BM, int BN, bool VECTOR, int PRODUCT>
__global__ void __launch_bounds__(THREADS<BM, BN>, 2) grouped_rows_float(
    const float* a, const int* order, int slots, const float* weight, const float* bias, const int* offsets, const float* pre_activation, float* y,
    float* hidden, int rows, int n_experts, int depth, int width, int row_tiles, int column_tiles, int kind, float limit
) {
    using S = Sums<BM, BN, TALL<BM>>;
    alignas(16) __shared__ float shared[2][S::SIZE];
    const TileIndex index = tile_index(blockIdx.x, row_tiles, column_tiles);
    const Tile tile = find_tile<BM>(offsets, n_experts, rows, index.row);
    if (tile.expert < 0) return;
    const bool unused = tile.expert == n_experts, gated = PRODUCT == ACTIVATE && kind == SWIGLU;
    const int halves = gated ? 2 : 1, begin = index.column * (BN / halves), length = unused ? 0 : depth;
    const long long expert = unused ? 0 : tile.expert;

    KMajor<BM, THREADS<BM, BN>, VECTOR> left(length, [&](int i) -> const float* {
        const int row = tile.first + i;
        if (row >= tile.last || unused) return nullptr;
        return a + (long long)(order ? order[row] / slots : row) * depth;
    });
    const float* matrix = weight + expert * depth * width * halves;
    S sums;
    if constexpr (PRODUCT == FORWARD || PRODUCT == ACTIVATE) {
        KMajor<BN, THREADS<BM, BN>, VECTOR> right(length, [&](int j) -> const float* {
            const int half = gated ? j / (BN / 2) : 0, column = begin + (gated ? j % (BN / 2) : j);
            return column < width ? matrix + ((long long)half * width + column) * depth : nullptr;
        });
        sums.product(left, right, length, shared);
    } else {
        MNMajor<BN, THREADS<BM, BN>, VECTOR> right(matrix + begin, width, width - begin, length);
        sums.product(left, right, length, shared);
    }

    const Finish<float> finish = {bias && !unused ? bias + expert * width * halves : nullptr, pre_activation, y, hidden, width, kind, limit};
    const int column = begin + threadIdx.x % S::TX * QUAD, top = tile.first + threadIdx.x / S::TX * TALL<BM>;
#pragma unroll
    for (int i = 0; i < TALL<BM>; i++) {
        const int row = top + i;
        if (row >= tile.last) continue;
        if (gated) {
            if constexpr (PRODUCT == ACTIVATE)
                if (column < width) finish_activate<VECTOR>(finish, row, column, sums.sum[i][0], sums.sum[i][1]);
            continue;
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int here = column + h * (BN / 2);
            if (here >= width) continue;
            if constexpr (PRODUCT == ACTIVATE) finish_activate<VECTOR>(finish, row, here, sums.sum[i][h], sums.sum[i][h]);
            else if constexpr (PRODUCT == BACKWARD) finish_backward<VECTOR>(finish, row, here, sums.sum[i][h]);
            else finish_plain<VECTOR>(finish, row, here, sums.sum[i][h]);
        }
    }
}

template <int BM, int BN, bool VECTOR, bool GATHER>
__global__ void __launch_bounds__(THREADS<BM, BN>, 2) grouped_dw_float(
    const float* left, const float* right, const int* order, unsigned factor, int shift, const int* offsets, float* dw, int height, int width,
    int row_tiles, int column_tiles, bool accumulate
) {
    using S = Sums<BM, BN, TALL<BM>>;
    alignas(16) __shared__ float shared[2][S::SIZE];
    const int tiles = row_tiles * column_tiles, expert = blockIdx.x / tiles;
    const TileIndex index = tile_index(blockIdx.x % tiles, row_tiles, column_tiles);
    const int first = offsets[expert], length = offsets[expert + 1] - first;
    const int top = index.row * BM, begin = index.column * BN;
    if (accumulate && !length) return;

    MNMajor<BM, THREADS<BM, BN>, VECTOR> rows(left + (long long)first * height + top, height, height - top, length);
    const float* from = right + (GATHER ? 0 : (long long)first * width) + begin;
    MNMajor<BN, THREADS<BM, BN>, VECTOR, GATHER> columns(from, width, width - begin, length, GATHER ? order + first : nullptr, {factor, shift});
    S sums;
    sums.product(rows, columns, length, shared);
#pragma unroll
    for (int i = 0; i < TALL<BM>; i++) {
        const int row = top + threadIdx.x / S::TX * TALL<BM> + i;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int column = begin + threadIdx.x % S::TX * QUAD + h * (BN / 2);
            if (row >= height || column >= width) continue;
            float* to = dw + ((long long)expert * height + row) * width + column;
            if (accumulate) add_some<VECTOR>(to, sums.sum[i][h], width - column);
            store_some<VECTOR>(to, sums.sum[i][h], width - column);
        }
    }
}
