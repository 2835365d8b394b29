// attention in float32: y = softmax(scale q k^T, where seen, and a sink) v; logsumexp
//                                     y [B,Tq,Q,Cv], logsumexp [B,Q,Tq] <- q [B,Tq,Q,C], k [B,Tk,G,C], v [B,Tk,G,Cv]
// One block per 64 rows of a group; a thread has 4 of the rows and every eighth key of a tile. The block visits the tiles of N keys that its
// rows see. Values are copied while keys are multiplied, and the next keys while values are. The softmax is computed online, with an offset
// and a sum for each row (Milakov & Gimelshein 2018; Dao 2023), in the order of the tiles: equal inputs give equal bits. A row's offset, and with
// it its sums, changes only when a score exceeds it by more than SLACK, which is rare after the first tiles. C and Cv up to W.
// FLOPs: 2 (C + Cv) for each score in a visited tile.   Bytes: q and y once; k and v once per block that sees them, mostly from L2.
// Grid: B * G * ceil(Tq Q/G / 64), the last rows first (under a causal mask they have most to do); 128 threads; SHARED bytes of shared memory.
// Reference: minimoe/reference/attention.py.   Unproven: no card has run it.
#include "attention_fma.cuh"

extern __shared__ unsigned char dynamic_shared[];

constexpr int N = 32;  // keys of a tile
template <int W>
constexpr int SHARED = 4 * ((OWN + 2 * N) * STRIDE<W> + OWN * (N + QUAD) + OWN + TILES * (N + 2));

// The maximum, and the sum, of a row's scores over the threads that hold them.
__device__ inline float row_max(float value) {
#pragma unroll
    for (int offset = TX / 2; offset; offset /= 2) value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, offset));
    return value;
}
__device__ inline float row_sum(float value) {
#pragma unroll
    for (int offset = TX / 2; offset; offset /= 2) value += __shfl_xor_sync(ALL_LANES, value, offset);
    return value;
}

// The softmax of a thread's rows so far. A weight is 2^(factor score + offset).
struct Softmax {
    float factor, offset[ROWS], total[ROWS] = {};  // total: over the keys of this thread

    __device__ explicit Softmax(float factor) : factor(factor) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) offset[i] = NO_OFFSET;
    }
    __device__ bool exceeds(float score, int i) const { return fmaf(score, factor, offset[i]) > SLACK; }

    // Makes the largest of a row's scores its offset, where one of them exceeds the old one, and multiplies its sums by what that changes.
    template <int C>
    __device__ void rescale(float (&sum)[ROWS][C], const float (&most)[ROWS]) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const float score = row_max(most[i]), old = offset[i];
            if (exceeds(score, i)) offset[i] = -score * factor;
            const float change = exp2_approx(offset[i] - old);  // exactly 1 where the offset stays
            total[i] *= change;
#pragma unroll
            for (int c = 0; c < C; c++) sum[i][c] *= change;
        }
    }

    // Turns scores into weights, and adds them to the totals.
    template <int C, int COLUMNS>
    __device__ void weigh(float (&scores)[ROWS][COLUMNS], float (&sum)[ROWS][C]) {
        float most[ROWS];
        bool exceeded = false;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            most[i] = scores[i][0];
#pragma unroll
            for (int j = 1; j < COLUMNS; j++) most[i] = fmaxf(most[i], scores[i][j]);
            exceeded |= exceeds(most[i], i);
        }
        if (__any_sync(ALL_LANES, exceeded)) rescale(sum, most);
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                scores[i][j] = exp2_approx(fmaf(scores[i][j], factor, offset[i]));
                total[i] += scores[i][j];
            }
    }
};

template <int W>
__global__ void __launch_bounds__(128, 2) attention_float(
    const float* q, const float* k, const float* v, const int* q_pos, const int* k_pos, const bool* k_valid, const float* sinks, float* y,
    float* logsumexp, int groups, int heads, unsigned inverse, int n_q, int n_k, int width, int v_width, float scale, bool causal, int window,
    int q_pos_step, int k_pos_step, int valid_step, bool vector
) {
    float* own = reinterpret_cast<float*>(dynamic_shared);
    float* keys = own + OWN * STRIDE<W>;
    float* values = keys + N * STRIDE<W>;
    float* weights = values + N * STRIDE<W>;
    int* own_positions = reinterpret_cast<int*>(weights + OWN * (N + QUAD));
    int* positions = own_positions + OWN;

    const Sizes sizes = {groups, heads, inverse, n_q, n_k};
    const int n_tiles = (n_q * heads + OWN - 1) / OWN, unit = blockIdx.x / n_tiles, b = unit / groups, g = unit % groups;
    const int first_row = (n_tiles - 1 - int(blockIdx.x % n_tiles)) * OWN;
    const Positions of_rows = {q_pos + (long long)b * q_pos_step, nullptr, n_q * heads, inverse};
    const Positions of_keys = {k_pos + (long long)b * k_pos_step, k_valid ? k_valid + (long long)b * valid_step : nullptr, n_k, 0};
    const Sight sight = {causal, window};

    const TileCopy<W, OWN> copy_own(sizes.queries(q, width, b, g), vector);
    copy_own.clear(own);
    copy_own(own, first_row);
    commit_copies();
    const TileCopy<W, N> copy_keys(sizes.keys(k, width, b, g), vector), copy_values(sizes.keys(v, v_width, b, g), vector);
    copy_keys.clear(keys);
    copy_values.clear(values);
    const Range range = look_at_own<OWN, false>(of_rows, first_row, own_positions);
    float sum[ROWS][W / TX] = {};
    Softmax softmax(scale * LOG2E);

    for (int chunk = 0; chunk * N < n_k; chunk += TILES) {
        Visits visits = look_ahead<N, THREADS, true>(of_keys, chunk, positions, range, sight);
        if (visits.due) {
            const int first = (chunk + __ffs(visits.due) - 1) * N;
            copy_keys(keys, first);
            commit_copies();
            copy_values(values, first);
            commit_copies();
        }
        while (visits.due) {
            const int tile = __ffs(visits.due) - 1;
            visits.due &= visits.due - 1;
            const int next = (chunk + __ffs(visits.due) - 1) * N;  // where one is due
            wait_for_copies<1>();
            __syncthreads();  // the keys are there
            float scores[ROWS][N / TX] = {};
            multiply_rows<W>(scores, own + own_row() * STRIDE<W>, keys + other_row() * STRIDE<W>);
            __syncthreads();
            if (visits.due) copy_keys(keys, next);
            commit_copies();

            if (!(visits.clear >> tile & 1)) hide<true>(scores, own_positions + own_row(), positions + tile * N + other_row(), sight);
            softmax.weigh(scores, sum);
            put_scores(weights + own_row() * (N + QUAD), scores);
            wait_for_copies<1>();
            __syncthreads();  // the values are there
            multiply_scores<W, N>(sum, weights + own_row() * (N + QUAD), values);
            __syncthreads();
            if (visits.due) copy_values(values, next);
            commit_copies();
        }
    }
    wait_for_copies<0>();  // of the rows, where no key was seen

#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int row = first_row + own_row() + i;
        const bool exists = row < n_q * heads;
        float all = row_sum(softmax.total[i]), most = -softmax.offset[i], rescale = 1.0f;
        if (sinks && exists) {
            const float sink = sinks[g * heads + row - token_of(row, inverse) * heads] * LOG2E, shift = fmaxf(most, sink);
            rescale = exp2_approx(most - shift);
            all = all * rescale + exp2_approx(sink - shift);
            most = shift;
        }
        const float share = all == 0.0f ? 0.0f : rescale / all;
#pragma unroll
        for (int c = 0; c < W / TX; c++) sum[i][c] *= share;
        if (exists && other_row() == 0) logsumexp[sizes.statistic(b, g, row)] = all == 0.0f ? -infinity() : most * LN2 + logf(all);
    }
    store_rows<W>(sum, sizes.queries(y, v_width, b, g), first_row + own_row(), vector);
}
