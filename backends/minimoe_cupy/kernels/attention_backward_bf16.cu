// attention_backward in bfloat16 on the tensor cores:   P = exp(scale q k^T - logsumexp), dS = P * (dy v^T - delta),
//     KEYS: dk = scale dS^T q, dv = P^T dy             [B,Tk,G,C], [B,Tk,G,Cv] <- q, k, v, dy, logsumexp [B,Q,Tq], delta [B,Q,Tq]
//     else: dq = scale dS k                            [B,Tq,Q,C]
// One text for both, in which a block has a tile of its own, of keys (k, v) or rows (q, dy), and meets tiles of the other kind, the next one's
// copy under way where two stages fit (99 KB, which every card has); else other blocks work meanwhile. Scores are made with the own tile on the
// left, so that P and dS lie in registers as the left side of the products that follow, and a gradient is summed by one block in the order of
// the tiles: equal inputs give equal bits, and the 7 products (5 are least) need no atomics.
// Grid: KEYS: B * G * ceil(Tk / OWN), else B * G * ceil(Tq Q/G / OWN), the last rows first; 4 warps. C and Cv up to W, rows of 16 bytes' multiples.
// FLOPs: for each score in a visited tile 4 (C + Cv) with KEYS, else 4 C + 2 Cv.   Bytes: the own tile once, the others from the second cache.
// Shared: (2 OWN + 2 STAGES OTHER) (W + 8) * 2 + (OWN + 32 OTHER + 64 + 2 STAGES OTHER) * 4.   Defined in minimoe/reference/attention.py.
#include "attention_mma.cuh"

extern __shared__ unsigned char dynamic_shared[];

// Rows of a warp over 16, and of the other tile: what 255 registers allow. (attention.py has the same numbers.)
template <int W, bool KEYS>
constexpr int M = W <= 64 || !KEYS ? 2 : 1;
template <int W, bool KEYS>
constexpr int OTHER = W == 32 || (W == 64) != KEYS ? 64 : 32;
template <int W>
constexpr int STAGES = W <= 64 ? 2 : 1;  // what 99 KB hold

template <int W, bool KEYS>
__global__ void __launch_bounds__(128) attention_backward_bf16(
    const bf16* q, const bf16* k, const bf16* v, const bf16* dy, const float* logsumexp, const float* delta, const int* q_pos,
    const int* k_pos, const bool* k_valid, bf16* gradient, bf16* dv, int groups, int heads, unsigned inverse, int n_q, int n_k, int width,
    int v_width, float scale, bool causal, int window, int q_pos_step, int k_pos_step, int valid_step
) {
    constexpr int ROWS = 16 * M<W, KEYS>, OWN = ROWS * WARPS, N = OTHER<W, KEYS>, TILE = N * STRIDE<W>;
    bf16* own = reinterpret_cast<bf16*>(dynamic_shared);  // keys, or rows of q
    bf16* own_values = own + OWN * STRIDE<W>;             // values, or rows of dy
    bf16* others = own_values + OWN * STRIDE<W>;          // STAGES of both
    int* own_positions = reinterpret_cast<int*>(others + 2 * STAGES<W> * TILE);
    int* positions = own_positions + OWN;
    float* statistics = reinterpret_cast<float*>(positions + TILES * N + 2 * TILES);  // KEYS: STAGES of logsumexp and delta

    const Shape shape = {groups, heads, inverse, n_q, n_k};
    const int n_own = KEYS ? n_k : n_q * heads, n_other = KEYS ? n_q * heads : n_k, n_tiles = (n_own + OWN - 1) / OWN;
    const int unit = blockIdx.x / n_tiles, b = unit / groups, g = unit % groups, place = blockIdx.x % n_tiles;
    const int first = (KEYS ? place : n_tiles - 1 - place) * OWN;
    const Rows<const bf16> q_rows = shape.queries(q, width, b, g), dy_rows = shape.queries(dy, v_width, b, g);
    const Rows<const bf16> k_rows = shape.keys(k, width, b, g), v_rows = shape.keys(v, v_width, b, g);
    const Positions of_rows = {q_pos + (long long)b * q_pos_step, nullptr, n_q * heads, inverse};
    const Positions of_keys = {k_pos + (long long)b * k_pos_step, k_valid ? k_valid + (long long)b * valid_step : nullptr, n_k, 0};
    const Sight sight = {causal, window};
    const int warp_row = threadIdx.x / WARP * ROWS, lane = threadIdx.x % WARP;
    const float factor = scale * LOG2E;

    copy_rows<W, OWN>(own, KEYS ? k_rows : q_rows, first);
    copy_rows<W, OWN>(own_values, KEYS ? v_rows : dy_rows, first);
    const Range range = look_at_own<OWN, KEYS>(KEYS ? of_keys : of_rows, first, own_positions);
    // logsumexp, of base 2, and delta of a row; infinity, so that P is 0, for one that saw nothing or is none.
    const auto statistics_of = [&](int row) {
        float2 result = {infinity(), 0.0f};
        if (row < n_q * heads) {
            const long long at = shape.statistic(b, g, row);
            result.x = logsumexp[at] == -infinity() ? infinity() : logsumexp[at] * LOG2E;
            result.y = delta[at];
        }
        return result;
    };
    const auto fetch = [&](int tile, int stage) {
        copy_rows<W, N>(others + 2 * stage * TILE, KEYS ? q_rows : k_rows, tile * N);
        copy_rows<W, N>(others + (2 * stage + 1) * TILE, KEYS ? dy_rows : v_rows, tile * N);
        commit_copies();
    };
    const auto keep = [&](float2 of_row, int stage) {
        if (KEYS && threadIdx.x < N) {
            statistics[2 * stage * N + threadIdx.x] = of_row.x;
            statistics[(2 * stage + 1) * N + threadIdx.x] = of_row.y;
        }
    };
    float2 of_own[M<W, KEYS>][2];
    if (!KEYS) {
#pragma unroll
        for (int m = 0; m < M<W, KEYS>; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) of_own[m][half] = statistics_of(first + warp_row + 16 * m + lane / 4 + 8 * half);
    }

    float sum[M<W, KEYS>][W / 8][4] = {}, v_sum[KEYS ? M<W, KEYS> : 1][W / 8][4] = {};
    int stage = 0;
    for (int chunk = 0; chunk * N < n_other; chunk += TILES) {
        Visits visits = look_ahead<N, THREADS, !KEYS>(KEYS ? of_rows : of_keys, chunk, positions, range, sight);
        if (visits.due) {
            const int tile = chunk + __ffs(visits.due) - 1;
            fetch(tile, stage);
            if (KEYS && threadIdx.x < N) keep(statistics_of(tile * N + threadIdx.x), stage);
        }
        while (visits.due) {
            const int tile = __ffs(visits.due) - 1;
            visits.due &= visits.due - 1;
            wait_for_copies<0>();
            __syncthreads();
            const int next = chunk + __ffs(visits.due) - 1;  // where one is due
            float2 of_next = {};
            if (visits.due) {
                if (STAGES<W> == 2) fetch(next, stage ^ 1);
                if (KEYS && threadIdx.x < N) of_next = statistics_of(next * N + threadIdx.x);
            }

            const bf16* other = others + 2 * stage * TILE;
            const bf16* other_values = other + TILE;
            float p[M<W, KEYS>][N / 8][4] = {}, ds[M<W, KEYS>][N / 8][4] = {};
            multiply_rows<W, M<W, KEYS>, N>(p, own + warp_row * STRIDE<W>, other);
            if (!(visits.clear >> tile & 1)) hide<M<W, KEYS>, N, !KEYS>(p, own_positions + warp_row, positions + tile * N, sight);
            multiply_rows<W, M<W, KEYS>, N>(ds, own_values + warp_row * STRIDE<W>, other_values);
#pragma unroll
            for (int n = 0; n < N / 8; n++) {
                float2 column_lse, column_delta;
                if (KEYS) {
                    const float* of_columns = statistics + 2 * stage * N + 8 * n + lane % 4 * 2;
                    column_lse = *reinterpret_cast<const float2*>(of_columns);
                    column_delta = *reinterpret_cast<const float2*>(of_columns + N);
                }
#pragma unroll
                for (int m = 0; m < M<W, KEYS>; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float lse = !KEYS ? of_own[m][i / 2].x : i % 2 ? column_lse.y : column_lse.x;
                        const float mean = !KEYS ? of_own[m][i / 2].y : i % 2 ? column_delta.y : column_delta.x;
                        p[m][n][i] = exp2_approx(p[m][n][i] * factor - lse);
                        ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - mean);
                    }
            }
            unsigned weights[M<W, KEYS>][N / 16][4];
            if constexpr (KEYS) {
                round_scores<M<W, KEYS>, N>(weights, p);
                multiply_scores<W, M<W, KEYS>, N>(v_sum, weights, other_values);
            }
            round_scores<M<W, KEYS>, N>(weights, ds);
            multiply_scores<W, M<W, KEYS>, N>(sum, weights, other);
            if (STAGES<W> == 2) stage ^= 1;
            else __syncthreads();  // all are done with the one stage
            if (visits.due) {
                if (STAGES<W> == 1) fetch(next, stage);
                keep(of_next, stage);
            }
        }
    }
    commit_copies();  // of the own tile, where nothing was seen
    wait_for_copies<0>();
    __syncthreads();

#pragma unroll
    for (int m = 0; m < M<W, KEYS>; m++)
#pragma unroll
        for (int c = 0; c < W / 8; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[m][c][i] *= scale;
    const Rows<bf16> to = KEYS ? shape.keys(gradient, width, b, g) : shape.queries(gradient, width, b, g);
    store_rows<W, M<W, KEYS>>(sum, own + warp_row * STRIDE<W>, to, first + warp_row);
    if constexpr (KEYS)
        store_rows<W, M<W, KEYS>>(v_sum, own_values + warp_row * STRIDE<W>, shape.keys(dv, v_width, b, g), first + warp_row);
}
