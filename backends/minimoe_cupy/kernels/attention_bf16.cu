// attention in bfloat16 on the tensor cores: y = softmax(scale q k^T, where seen, and a sink) v; logsumexp
//                                     y [B,Tq,Q,Cv], logsumexp [B,Q,Tq] <- q [B,Tq,Q,C], k [B,Tk,G,C], v [B,Tk,G,Cv]
// One block per OWN rows of a group; each of its 4 warps has 16 M of the rows. The block visits the tiles of OTHER keys that its rows see,
// while the next tile is copied in the background. The softmax is computed online, with a maximum and a sum for each row (Milakov &
// Gimelshein 2018; Dao 2023), in the order of the tiles: equal inputs give equal bits. C and Cv up to W, rows at multiples of 16 bytes.
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

template <int W>
__global__ void __launch_bounds__(128) attention_bf16(
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
    const int n_tiles = (n_q * heads + OWN - 1) / OWN, unit = blockIdx.x / n_tiles, b = unit / groups, g = unit % groups;
    const int first_row = (n_tiles - 1 - int(blockIdx.x % n_tiles)) * OWN;
    const Rows<const bf16> q_rows = sizes.queries(q, width, b, g), k_rows = sizes.keys(k, width, b, g), v_rows = sizes.keys(v, v_width, b, g);
    const Positions of_rows = {q_pos + (long long)b * q_pos_step, nullptr, n_q * heads, inverse};
    const Positions of_keys = {k_pos + (long long)b * k_pos_step, k_valid ? k_valid + (long long)b * valid_step : nullptr, n_k, 0};
    const Sight sight = {causal, window};
    const int warp_row = threadIdx.x / WARP * 16 * M, lane = threadIdx.x % WARP;
    const float factor = scale * LOG2E;

    copy_rows<W, OWN>(own, q_rows, first_row);
    const Range range = look_at_own<OWN, false>(of_rows, first_row, own_positions);
    float sum[M][W / 8][4] = {}, top[M][2], total[M][2] = {};  // top, of q k^T: the largest so far
#pragma unroll
    for (int m = 0; m < M; m++) top[m][0] = top[m][1] = -infinity();
    const auto fetch = [&](int tile, int stage) {
        copy_rows<W, N>(keys + 2 * stage * TILE, k_rows, tile * N);
        copy_rows<W, N>(keys + (2 * stage + 1) * TILE, v_rows, tile * N);
        commit_copies();
    };

    int stage = 0;
    for (int chunk = 0; chunk * N < n_k; chunk += TILES) {
        Visits visits = look_ahead<N, THREADS, true>(of_keys, chunk, positions, range, sight);
        if (visits.due) fetch(chunk + __ffs(visits.due) - 1, stage);
        while (visits.due) {
            const int tile = __ffs(visits.due) - 1;
            visits.due &= visits.due - 1;
            wait_for_copies<0>();
            __syncthreads();
            if (visits.due) fetch(chunk + __ffs(visits.due) - 1, stage ^ 1);

            float scores[M][N / 8][4] = {};
            multiply_rows<W, M, N>(scores, own + warp_row * STRIDE<W>, keys + 2 * stage * TILE);
            if (!(visits.clear >> tile & 1)) hide<M, N, true>(scores, own_positions + warp_row, positions + tile * N, sight);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float most = top[m][half];
#pragma unroll
                    for (int n = 0; n < N / 8; n++) most = fmaxf(most, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
                    most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
                    most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
                    const float shift = most == -infinity() ? 0.0f : most * factor;
                    const float rescale = exp2_approx(top[m][half] * factor - shift);
                    top[m][half] = most;
                    total[m][half] *= rescale;
#pragma unroll
                    for (int n = 0; n < N / 8; n++)
#pragma unroll
                        for (int i = 2 * half; i < 2 * half + 2; i++) {
                            scores[m][n][i] = exp2_approx(scores[m][n][i] * factor - shift);
                            total[m][half] += scores[m][n][i];
                        }
#pragma unroll
                    for (int c = 0; c < W / 8; c++) {
                        sum[m][c][2 * half] *= rescale;
                        sum[m][c][2 * half + 1] *= rescale;
                    }
                }
            unsigned weights[M][N / 16][4];
            round_scores<M, N>(weights, scores);
            multiply_scores<W, M, N>(sum, weights, keys + (2 * stage + 1) * TILE);
            stage ^= 1;
        }
    }
    commit_copies();  // of the rows, where no key was seen
    wait_for_copies<0>();
    __syncthreads();

#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = first_row + warp_row + 16 * m + lane / 4 + 8 * half;
            const bool exists = row < n_q * heads;
            float all = total[m][half];
            all += __shfl_xor_sync(ALL_LANES, all, 1);
            all += __shfl_xor_sync(ALL_LANES, all, 2);
            float most = top[m][half] * factor, rescale = 1.0f;
            if (sinks && exists) {
                const float sink = sinks[g * heads + row - token_of(row, inverse) * heads] * LOG2E, shift = fmaxf(most, sink);
                rescale = shift == -infinity() ? 0.0f : exp2_approx(most - shift);
                all = shift == -infinity() ? 0.0f : all * rescale + exp2_approx(sink - shift);
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
