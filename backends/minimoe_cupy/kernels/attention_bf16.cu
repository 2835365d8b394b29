// attention in bfloat16 on the tensor cores: y = softmax(scale q k^T, where seen, and a sink) v; logsumexp
//                                     y [B,Tq,Q,Cv], logsumexp [B,Q,Tq] <- q [B,Tq,Q,C], k [B,Tk,G,C], v [B,Tk,G,Cv]
// One block per OWN rows of a group; each of its 4 warps has 16 M of the rows. The block visits the tiles of OTHER keys that its rows see,
// while the next tile is copied in the background. The softmax is computed online, with an offset and a sum for each row (Milakov & Gimelshein
// 2018; Dao 2023), in the order of the tiles: equal inputs give equal bits. A row's offset, and with it all its sums, changes only when a score
// exceeds it by more than SLACK, which is rare after the first tiles. C and Cv up to W, rows at multiples of 16 bytes.
// FLOPs: 2 (C + Cv) for each score in a visited tile.   Bytes: q and y once; k and v once per block that sees them, mostly from L2.
// Grid: B * G * ceil(Tq Q/G / OWN), the last rows first (under a causal mask they have most to do); 128 threads; SHARED bytes of shared memory.
// Reference: minimoe/reference/attention.py.   Unproven: no card has run it.
#include "attention_mma.cuh"

extern __shared__ unsigned char dynamic_shared[];

constexpr int M = 2, OWN = 16 * M * WARPS;
template <int W>
constexpr int OTHER = W <= 64 ? 64 : 32;  // keys of a tile: what 255 registers allow
template <int W>
constexpr int SHARED = 2 * (OWN + 4 * OTHER<W>) * STRIDE<W> + 4 * (OWN + TILES * (OTHER<W> + 2));

// The softmax of a lane's rows so far. A weight is 2^(factor score + offset). A row's four lanes have the same offset, and each the total of its
// own columns.
template <int M>
struct Softmax {
    float factor, offset[M][2], total[M][2] = {};

    __device__ explicit Softmax(float factor) : factor(factor) {
#pragma unroll
        for (int m = 0; m < M; m++) offset[m][0] = offset[m][1] = NO_OFFSET;
    }
    __device__ bool exceeds(float score, int m, int half) const { return fmaf(score, factor, offset[m][half]) > SLACK; }

    // Makes the largest of a row's scores its offset, where one of them exceeds the old one, and multiplies its sums by what that changes.
    template <int C>
    __device__ void rescale(float (&sum)[M][C][4], const float (&most)[M][2]) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float score = fmaxf(most[m][half], __shfl_xor_sync(ALL_LANES, most[m][half], 1));
                score = fmaxf(score, __shfl_xor_sync(ALL_LANES, score, 2));
                const float old = offset[m][half];
                if (exceeds(score, m, half)) offset[m][half] = -score * factor;
                const float change = exp2_approx(offset[m][half] - old);  // exactly 1 where the offset stays
                total[m][half] *= change;
#pragma unroll
                for (int c = 0; c < C; c++) {
                    sum[m][c][2 * half] *= change;
                    sum[m][c][2 * half + 1] *= change;
                }
            }
    }

    // Turns scores into weights, and adds them to the totals.
    template <int C, int COLUMNS>
    __device__ void weigh(float (&scores)[M][COLUMNS][4], float (&sum)[M][C][4]) {
        float most[M][2];
        bool exceeded = false;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                most[m][half] = -infinity();
#pragma unroll
                for (int n = 0; n < COLUMNS; n++)
                    most[m][half] = fmaxf(most[m][half], fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
                exceeded |= exceeds(most[m][half], m, half);
            }
        if (__any_sync(ALL_LANES, exceeded)) rescale(sum, most);
#pragma unroll
        for (int n = 0; n < COLUMNS; n++)
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    scores[m][n][i] = exp2_approx(fmaf(scores[m][n][i], factor, offset[m][i / 2]));
                    total[m][i / 2] += scores[m][n][i];
                }
    }
};

template <int W>
__global__ void __launch_bounds__(128, 2) attention_bf16(
    const bf16* q, const bf16* k, const bf16* v, const int* q_pos, const int* k_pos, const bool* k_valid, const float* sinks, bf16* y,
    float* logsumexp, int groups, int heads, unsigned inverse, int n_q, int n_k, int width, int v_width, float scale, bool causal, int window,
    int q_pos_step, int k_pos_step, int valid_step
) {
    constexpr int N = OTHER<W>, TILE = N * STRIDE<W>;
    bf16* own = reinterpret_cast<bf16*>(dynamic_shared);
    bf16* keys = own + OWN * STRIDE<W>;  // two stages of keys and values
    int* own_positions = reinterpret_cast<int*>(keys + 4 * TILE);
    int* positions = own_positions + OWN;

    const Sizes sizes = {groups, heads, inverse, n_q, n_k};
    const auto place = [&] { return Place::of_block<OWN, true>(groups, n_q * heads); };
    const Place at = place();
    const Sight sight = {causal, window};
    const int warp_row = threadIdx.x / WARP * 16 * M, lane = threadIdx.x % WARP;

    const TileCopy<W, OWN, 1> copy_own({sizes.queries(q, width, at.b, at.g)});
    copy_own.clear(own);
    copy_own(own, at.first);
    const Range range = look_at_own<OWN, false>({q_pos + (long long)at.b * q_pos_step, nullptr, n_q * heads, inverse}, at.first, own_positions);
    float sum[M][W / 8][4] = {};
    Softmax<M> softmax(scale * LOG2E);
    const TileCopy<W, N, 2> copy({sizes.keys(k, width, at.b, at.g), sizes.keys(v, v_width, at.b, at.g)});
    copy.clear(keys);
    copy.clear(keys + 2 * TILE);
    const auto fetch = [&](int tile, int stage) {
        copy(keys + stage, tile * N);
        commit_copies();
    };
    const bf16* left = own + kept(warp_row * STRIDE<W> + straight_lane<W>());
    const bf16* right = keys + kept(transposed_lane<W>());
    const bf16* value = keys + TILE + kept(straight_lane<W>());

    int stage = 0;  // where it begins: 0 or 2 TILE
    for (int chunk = 0; chunk * N < n_k; chunk += TILES) {
        const long long sequence = place().b;
        const Positions of_keys = {k_pos + sequence * k_pos_step, k_valid ? k_valid + sequence * valid_step : nullptr, n_k, 0};
        Visits visits = look_ahead<N, THREADS, true>(of_keys, chunk, positions, range, sight);
        int tile = __ffs(visits.due) - 1;
        if (visits.due) fetch(chunk + tile, stage);
        while (visits.due) {
            const bool clear = visits.clear & visits.due & -visits.due;
            visits.due &= visits.due - 1;
            wait_for_copies<0>();
            __syncthreads();
            const int next = __ffs(visits.due) - 1;
            if (visits.due) fetch(chunk + next, stage ^ 2 * TILE);

            float scores[M][N / 8][4] = {};
            multiply_rows<W, M, N>(scores, left, right + stage);
            if (!clear) hide<M, N, true>(scores, own_positions + warp_row, positions + tile * N, sight);
            softmax.weigh(scores, sum);
            unsigned weights[M][N / 16][4];
            round_scores<M, N>(weights, scores);
            multiply_scores<W, M, N>(sum, weights, value + stage);
            stage ^= 2 * TILE;
            tile = next;
        }
    }
    commit_copies();  // of the rows, where no key was seen
    wait_for_copies<0>();
    __syncthreads();
    const auto [b, g, first_row] = place();

#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = first_row + warp_row + 16 * m + lane / 4 + 8 * half;
            const bool exists = row < n_q * heads;
            float all = softmax.total[m][half];
            all += __shfl_xor_sync(ALL_LANES, all, 1);
            all += __shfl_xor_sync(ALL_LANES, all, 2);
            float most = -softmax.offset[m][half], rescale = 1.0f;
            if (sinks && exists) {
                const float sink = sinks[g * heads + row - token_of(row, inverse) * heads] * LOG2E, shift = fmaxf(most, sink);
                rescale = exp2_approx(most - shift);
                all = all * rescale + exp2_approx(sink - shift);
                most = shift;
            }
            const float share = all == 0.0f ? 0.0f : rescale / all;
#pragma unroll
            for (int c = 0; c < W / 8; c++) {
                sum[m][c][2 * half] *= share;
                sum[m][c][2 * half + 1] *= share;
            }
            if (exists && lane % 4 == 0) logsumexp[sizes.statistic(b, g, row)] = all == 0.0f ? -infinity() : most * LN2 + logf(all);
        }
    store_rows<W, M>(sum, own + warp_row * STRIDE<W>, sizes.queries(y, v_width, b, g), first_row + warp_row);
}
