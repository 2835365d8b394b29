// normalise: y = (t - mean) * rstd * weight + bias, t = x + delta      y, total [N,D], mean, rstd [N] <- x, delta [N,D], weight, bias [D]
// normalise_backward, weight_sums: dx [N,D], dweight and dbias [D], from dy.   CENTRED: layer norm, otherwise RMS norm (mean 0).
// blockDim.x threads per row, which keep it in registers (HELD, norm.cuh); x and delta are read once, total and y written once. Statistics
// are float sums: each thread in the order of its columns, then a tree. The variance sums squares of differences from the mean, in a second pass
// over the registers. Bytes, FLOPs and grids are given with each kernel.
// Reference: minimoe/reference/norm.py.   Unproven: no card has run it.
#include "norm.cuh"

constexpr int MOST = 1024, MOST_BACKWARD = 512;  // threads of a block, at most: backward gives each up to 128 registers
constexpr int SUM_THREADS = 256;

// normalise: y = (t - mean) * rstd * weight + bias, t = x + delta, which is kept as `total`          [N,D], [N], [N] <- [N,D], [N,D], [D], [D]
// delta and bias may be null. A block has blockDim.y rows; one if a row is more than a warp.
// Bytes: 2 N D sizeof(T), fused 4 N D sizeof(T).   FLOPs: 4 N D, centred 7 N D.   Grid: ceil(N / blockDim.y).
template <class T, bool CENTRED, int HELD, int V>
__global__ void __launch_bounds__(MOST) normalise(
    const T* x, const T* delta, const T* __restrict__ weight, const T* __restrict__ bias, T* total, T* y, float* mean, float* rstd, float eps,
    int n_rows, int d_model
) {
    __shared__ float shared[2][1][MOST_WARPS];
    const long long n = (long long)blockIdx.x * blockDim.y + threadIdx.y, first = n * d_model;
    const int width = n < n_rows ? d_model : 0;  // threads without a row take part in their warp's sums
    Row<T, V, HELD> row(x + first, width);
    if (delta) row.add(delta + first, total + first, width);

    float sum[1] = {};
    over_row<V, HELD>(width, [&](int i, int column) {
        float values[V];
        row.get(i, column, values);
#pragma unroll
        for (int j = 0; j < V; j++) sum[0] += CENTRED ? values[j] : values[j] * values[j];
    });
    row_sum(sum, shared[0]);
    float middle = 0.0f;
    if constexpr (CENTRED) {
        middle = sum[0] / d_model;
        sum[0] = 0.0f;
        over_row<V, HELD>(width, [&](int i, int column) {
            float values[V];
            row.get(i, column, values);
#pragma unroll
            for (int j = 0; j < V; j++) sum[0] += (values[j] - middle) * (values[j] - middle);
        });
        row_sum(sum, shared[1]);
    }
    const float scale = 1.0f / sqrtf(sum[0] / d_model + eps);
    over_row<V, HELD>(width, [&](int i, int column) {
        float values[V], factor[V], constant[V] = {};
        row.get(i, column, values);
        load(weight + column, factor);
        if (bias) load(bias + column, constant);
#pragma unroll
        for (int j = 0; j < V; j++) values[j] = (values[j] - middle) * scale * factor[j] + constant[j];
        store(y + first + column, values);
    });
    if (threadIdx.x || !width) return;
    rstd[n] = scale;
    if constexpr (CENTRED) mean[n] = middle;
}

// normalise_backward: dx = rstd (g - xhat mean(g xhat) [- mean(g)]) + dtotal, g = dy * weight                    [N,D] <- [N,D] thrice, [D]
// HELD: with dweight = sum of dy * xhat, and CENTRED dbias = sum of dy, beside it: a block takes `piece` rows, blockDim.y at a time, keeps its
// sums in registers, and writes them as a row of `partial` [blocks, D or 2D], whose rows column_sums (columns.cu) adds in order.
// Bytes: 3 N D sizeof(T), 4 with dtotal; partial.   FLOPs: 11 N D, centred 14 N D.   Grid: ceil(N / piece); one if N is 0 and sums are wanted.
template <class T, bool CENTRED, int HELD, int V>
__global__ void __launch_bounds__(MOST_BACKWARD, 1) normalise_backward(
    const T* dy, const T* x, const T* __restrict__ weight, const float* mean, const float* rstd, const T* dtotal, T* dx, float* partial,
    int n_rows, int d_model, int piece
) {
    constexpr int COUNT = CENTRED ? 2 : 1, SLOTS = HELD ? HELD : 1;
    __shared__ float shared[2][COUNT][MOST_WARPS];
    float sums[COUNT][SLOTS][V] = {};
    int turn = 0;
    const long long begin = (long long)blockIdx.x * piece, end = min((long long)n_rows, begin + piece);
    for (long long start = begin; start < end; start += blockDim.y, turn ^= 1) {  // `shared` has two halves: one barrier per round is enough
        const long long n = start + threadIdx.y, first = n * d_model;
        const int width = n < end ? d_model : 0;
        const float scale = width ? rstd[n] : 0.0f, middle = CENTRED && width ? mean[n] : 0.0f;
        const Row<T, V, HELD> above(dy + first, width), row(x + first, width);
        const Row<T, V, CENTRED ? 0 : HELD> more(dtotal + first, dtotal ? width : 0);  // kept where there are registers left

        float product[COUNT] = {};  // of g xhat; of g
        over_row<V, HELD>(width, [&](int i, int column) {
            float gradient[V], values[V], factor[V];
            above.get(i, column, gradient);
            row.get(i, column, values);
            load(weight + column, factor);
#pragma unroll
            for (int j = 0; j < V; j++) {
                const float share = gradient[j] * ((values[j] - middle) * scale);
                product[0] += share * factor[j];
                if constexpr (HELD) sums[0][i][j] += share;
                if constexpr (CENTRED) {
                    product[1] += gradient[j] * factor[j];
                    if constexpr (HELD) sums[1][i][j] += gradient[j];
                }
            }
        });
        row_sum(product, shared[turn]);
        const float along = product[0] / d_model, across = CENTRED ? product[COUNT - 1] / d_model : 0.0f;
        over_row<V, HELD>(width, [&](int i, int column) {
            float gradient[V], values[V], factor[V], old[V] = {};
            above.get(i, column, gradient);
            row.get(i, column, values);
            load(weight + column, factor);
            if (dtotal) more.get(i, column, old);
#pragma unroll
            for (int j = 0; j < V; j++)
                gradient[j] = (gradient[j] * factor[j] - across - (values[j] - middle) * scale * along) * scale + old[j];
            store(dx + first + column, gradient);
        });
    }
    if constexpr (HELD) {
        __shared__ float columns[MOST_BACKWARD * V];
#pragma unroll
        for (int c = 0; c < COUNT; c++) {
#pragma unroll
            for (int i = 0; i < HELD; i++) {
                const int first = i * int(blockDim.x) * V;
                if (first < d_model) sum_over_rows(sums[c][i], columns, partial + ((long long)blockIdx.x * COUNT + c) * d_model, first, d_model);
            }
        }
    }
}

// weight_sums: partial[s] = sum over the rows of piece s of dy * xhat, CENTRED then of dy                       [S, D or 2D] <- [N,D], [N,D]
// For rows too long for normalise_backward to keep sums of. Each row of threads takes every blockDim.y-th row of the piece.
// Bytes: 2 N D sizeof(T); partial.   Block (columns, rows), at most SUM_THREADS.   Grid: (pieces of D, S).
template <int V, bool CENTRED, class T>
__global__ void __launch_bounds__(SUM_THREADS) weight_sums(
    const T* dy, const T* x, const float* mean, const float* rstd, float* partial, int n_rows, int d_model, int piece
) {
    constexpr int COUNT = CENTRED ? 2 : 1;
    __shared__ float shared[SUM_THREADS * V];
    const int first = blockIdx.x * blockDim.x * V, column = first + int(threadIdx.x) * V;
    const long long begin = (long long)blockIdx.y * piece, end = min((long long)n_rows, begin + piece);
    float sums[COUNT][V] = {};
    if (column < d_model) {
        for (long long n = begin + threadIdx.y; n < end; n += blockDim.y) {
            const float scale = rstd[n], middle = CENTRED ? mean[n] : 0.0f;
            float gradient[V], values[V];
            load(dy + n * d_model + column, gradient);
            load(x + n * d_model + column, values);
#pragma unroll
            for (int j = 0; j < V; j++) {
                sums[0][j] += gradient[j] * ((values[j] - middle) * scale);
                if constexpr (CENTRED) sums[1][j] += gradient[j];
            }
        }
    }
#pragma unroll
    for (int c = 0; c < COUNT; c++) sum_over_rows(sums[c], shared, partial + ((long long)blockIdx.y * COUNT + c) * d_model, first, d_model);
}
