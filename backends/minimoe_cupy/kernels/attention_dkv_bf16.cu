// attention_dkv in bfloat16, the gradients of keys and values:   P = exp(scale q k^T - logsumexp), dS = P * (dy v^T - delta),
//     dk = scale dS^T q, dv = P^T dy      dk [B,Tk,G,C], dv [B,Tk,G,Cv] <- q, k, v, dy as attention_dq_bf16.cu has them, logsumexp, delta [B,Q,Tq]
// One block per OWN keys of a group, with k and v in shared memory; each of its 4 warps has 16 M of the keys. The block visits the tiles of
// rows, of all heads of the group, that see its keys, while the next tile is copied in the background. Scores are computed transposed,
// [keys][rows], so that P^T and dS^T stay in registers as the left side of the products with dy and q. Each gradient is summed by one block,
// in the order of the tiles: equal inputs give equal bits, without atomics. C and Cv up to W, rows at multiples of 16 bytes.
// FLOPs: 4 (C + Cv) for each score in a visited tile.   Bytes: k, v, dk and dv once; q and dy once per block that they see, mostly from L2.
// Grid: B * G * ceil(Tk / OWN); 128 threads; SHARED bytes of shared memory.
// Reference: minimoe/reference/attention.py.   Unproven: no card has run it.
#include "attention_backward.cuh"
#include "attention_mma.cuh"

extern __shared__ unsigned char dynamic_shared[];

template <int W>
constexpr int M = W <= 64 ? 2 : 1;
template <int W>
constexpr int OWN = 16 * M<W> * WARPS;
template <int W>
constexpr int OTHER = W <= 32 ? 64 : 32;  // rows of a tile: what 255 registers allow
template <int W>
constexpr int SHARED = 4 * (OWN<W> + 2 * OTHER<W>) * STRIDE<W> + 4 * (OWN<W> + TILES * (OTHER<W> + 2) + 4 * OTHER<W>);

template <int W>
__global__ void __launch_bounds__(128, 2) attention_dkv_bf16(
    const bf16* q, const bf16* k, const bf16* v, const bf16* dy, const float* logsumexp, const float* delta, const int* q_pos,
    const int* k_pos, const bool* k_valid, bf16* dk, bf16* dv, int groups, int heads, unsigned inverse, int n_q, int n_k, int width,
    int v_width, float scale, bool causal, int window, int q_pos_step, int k_pos_step, int valid_step
) {
    constexpr int N = OTHER<W>, TILE = N * STRIDE<W>;
    bf16* k_tile = reinterpret_cast<bf16*>(dynamic_shared);  // [OWN][W]
    bf16* v_tile = k_tile + OWN<W> * STRIDE<W>;              // [OWN][W]
    bf16* stages = v_tile + OWN<W> * STRIDE<W>;              // two stages, of rows of q [N][W] and of dy [N][W]
    int* key_positions = reinterpret_cast<int*>(stages + 4 * TILE);
    int* row_positions = key_positions + OWN<W>;
    float* statistics = reinterpret_cast<float*>(row_positions + TILES * N + 2 * TILES);  // two stages, of offsets [N] and delta [N]

    const Sizes sizes = {groups, heads, inverse, n_q, n_k};
    const int n_rows = n_q * heads;
    const auto place = [&] { return Place::of_block<OWN<W>, false>(groups, n_k); };
    const Place at = place();
    const Sight sight = {causal, window};
    const int warp_key = threadIdx.x / WARP * 16 * M<W>, lane = threadIdx.x % WARP;
    const float factor = scale * LOG2E;

    const TileCopy<W, OWN<W>, 2> copy_own({sizes.keys(k, width, at.b, at.g), sizes.keys(v, v_width, at.b, at.g)});
    copy_own.clear(k_tile);
    copy_own(k_tile, at.first);
    const Positions of_keys = {k_pos + (long long)at.b * k_pos_step, k_valid ? k_valid + (long long)at.b * valid_step : nullptr, n_k, 0};
    const Range range = look_at_own<OWN<W>, true>(of_keys, at.first, key_positions);
    const TileCopy<W, N, 2> copy({sizes.queries(q, width, at.b, at.g), sizes.queries(dy, v_width, at.b, at.g)});
    copy.clear(stages);
    copy.clear(stages + 2 * TILE);
    const auto fetch = [&](int tile, int stage) {
        copy(stages + stage, tile * N);
        commit_copies();
    };
    const auto statistics_of = [&](int row) { return row_statistics(sizes, logsumexp, delta, at.b, at.g, row); };
    const auto keep = [&](float2 of_row, int stage) {
        float* to = statistics + (stage ? 2 * N : 0) + threadIdx.x;
        if (threadIdx.x < N) {
            to[0] = -of_row.x;
            to[N] = of_row.y;
        }
    };
    const bf16* k_left = k_tile + kept(warp_key * STRIDE<W> + straight_lane<W>());
    const bf16* v_left = k_left + OWN<W> * STRIDE<W>;
    const bf16* rows_transposed = stages + kept(transposed_lane<W>());
    const bf16* rows = stages + kept(straight_lane<W>());

    float k_sum[M<W>][W / 8][4] = {}, v_sum[M<W>][W / 8][4] = {};
    int stage = 0;  // where it begins: 0 or 2 TILE
    for (int chunk = 0; chunk * N < n_rows; chunk += TILES) {
        const Positions of_rows = {q_pos + (long long)place().b * q_pos_step, nullptr, n_rows, inverse};
        Visits visits = look_ahead<N, THREADS, false>(of_rows, chunk, row_positions, range, sight);
        int tile = __ffs(visits.due) - 1;
        if (visits.due) {
            fetch(chunk + tile, stage);
            if (threadIdx.x < N) keep(statistics_of((chunk + tile) * N + threadIdx.x), stage);
        }
        while (visits.due) {
            const bool clear = visits.clear & visits.due & -visits.due;
            visits.due &= visits.due - 1;
            wait_for_copies<0>();
            __syncthreads();
            const int next = __ffs(visits.due) - 1;
            float2 of_next = {};
            if (visits.due) {
                fetch(chunk + next, stage ^ 2 * TILE);
                if (threadIdx.x < N) of_next = statistics_of((chunk + next) * N + threadIdx.x);
            }

            float p[M<W>][N / 8][4] = {}, ds[M<W>][N / 8][4] = {};  // [keys][rows]
            multiply_rows<W, M<W>, N>(p, k_left, rows_transposed + stage);
            if (!clear) hide<M<W>, N, false>(p, key_positions + warp_key, row_positions + tile * N, sight);
            multiply_rows<W, M<W>, N>(ds, v_left, rows_transposed + stage + TILE);
            const float* of_columns = statistics + (stage ? 2 * N : 0) + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < N / 8; n++) {
                const float2 offset = *reinterpret_cast<const float2*>(of_columns + 8 * n);
                const float2 mean = *reinterpret_cast<const float2*>(of_columns + 8 * n + N);
#pragma unroll
                for (int m = 0; m < M<W>; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        p[m][n][i] = exp2_approx(fmaf(p[m][n][i], factor, i % 2 ? offset.y : offset.x));
                        ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - (i % 2 ? mean.y : mean.x));
                    }
            }
            unsigned weights[M<W>][N / 16][4];
            round_scores<M<W>, N>(weights, p);
            multiply_scores<W, M<W>, N>(v_sum, weights, rows + stage + TILE);
            round_scores<M<W>, N>(weights, ds);
            multiply_scores<W, M<W>, N>(k_sum, weights, rows + stage);
            stage ^= 2 * TILE;
            if (visits.due) keep(of_next, stage);
            tile = next;
        }
    }
    commit_copies();  // of the keys, where no row saw them
    wait_for_copies<0>();
    __syncthreads();
    const auto [b, g, first_key] = place();

#pragma unroll
    for (int m = 0; m < M<W>; m++)
#pragma unroll
        for (int c = 0; c < W / 8; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) k_sum[m][c][i] *= scale;
    store_rows<W, M<W>>(k_sum, k_tile + warp_key * STRIDE<W>, sizes.keys(dk, width, b, g), first_key + warp_key);
    store_rows<W, M<W>>(v_sum, v_tile + warp_key * STRIDE<W>, sizes.keys(dv, v_width, b, g), first_key + warp_key);
}
