// attention_dkv in bfloat16, the gradients of keys and values:   P = exp(scale q k^T - logsumexp), dS = P * (dy v^T - delta),
//     dk = scale dS^T q, dv = P^T dy      dk [B,Tk,G,C], dv [B,Tk,G,Cv] <- q, k, v, dy as attention_dq_bf16.cu has them, logsumexp, delta [B,Q,Tq]
// One block per OWN keys of a group, with k and v in shared memory; each of its 4 warps has 16 M of the keys. The block visits the tiles of
// rows, of all heads of the group, that see its keys. The next tile is copied in the background where two stages fit into 99 KB, which every
// card has; elsewhere other blocks work meanwhile. Scores are computed transposed, [keys][rows], so that P^T and dS^T stay in registers as the
// left side of the products with dy and q. Each gradient is summed by one block, in the order of the tiles: equal inputs give equal bits,
// without atomics. C and Cv up to W, rows at multiples of 16 bytes.
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
constexpr int OTHER = W == 64 ? 32 : 64;  // rows of a tile: what 255 registers allow
template <int W>
constexpr int STAGES = W <= 64 ? 2 : 1;  // what 99 KB hold
template <int W>
constexpr int SHARED = 4 * (OWN<W> + STAGES<W> * OTHER<W>) * STRIDE<W> + 4 * (OWN<W> + TILES * (OTHER<W> + 2) + 2 * STAGES<W> * OTHER<W>);

template <int W>
__global__ void __launch_bounds__(128) attention_dkv_bf16(
    const bf16* q, const bf16* k, const bf16* v, const bf16* dy, const float* logsumexp, const float* delta, const int* q_pos,
    const int* k_pos, const bool* k_valid, bf16* dk, bf16* dv, int groups, int heads, unsigned inverse, int n_q, int n_k, int width,
    int v_width, float scale, bool causal, int window, int q_pos_step, int k_pos_step, int valid_step
) {
    constexpr int N = OTHER<W>, TILE = N * STRIDE<W>;
    bf16* k_tile = reinterpret_cast<bf16*>(dynamic_shared);  // [OWN][W]
    bf16* v_tile = k_tile + OWN<W> * STRIDE<W>;              // [OWN][W]
    bf16* stages = v_tile + OWN<W> * STRIDE<W>;              // STAGES of rows of q [N][W] and of dy [N][W]
    int* key_positions = reinterpret_cast<int*>(stages + 2 * STAGES<W> * TILE);
    int* row_positions = key_positions + OWN<W>;
    float* statistics = reinterpret_cast<float*>(row_positions + TILES * N + 2 * TILES);  // STAGES of logsumexp [N] and delta [N]

    const Sizes sizes = {groups, heads, inverse, n_q, n_k};
    const int n_rows = n_q * heads, n_tiles = (n_k + OWN<W> - 1) / OWN<W>;
    const int unit = blockIdx.x / n_tiles, b = unit / groups, g = unit % groups, first_key = blockIdx.x % n_tiles * OWN<W>;
    const Rows<const bf16> q_rows = sizes.queries(q, width, b, g), dy_rows = sizes.queries(dy, v_width, b, g);
    const Positions of_rows = {q_pos + (long long)b * q_pos_step, nullptr, n_rows, inverse};
    const Positions of_keys = {k_pos + (long long)b * k_pos_step, k_valid ? k_valid + (long long)b * valid_step : nullptr, n_k, 0};
    const Sight sight = {causal, window};
    const int warp_key = threadIdx.x / WARP * 16 * M<W>, lane = threadIdx.x % WARP;
    const float factor = scale * LOG2E;

    copy_rows<W, OWN<W>>(k_tile, sizes.keys(k, width, b, g), first_key);
    copy_rows<W, OWN<W>>(v_tile, sizes.keys(v, v_width, b, g), first_key);
    const Range range = look_at_own<OWN<W>, true>(of_keys, first_key, key_positions);
    const auto fetch = [&](int tile, int stage) {
        copy_rows<W, N>(stages + 2 * stage * TILE, q_rows, tile * N);
        copy_rows<W, N>(stages + (2 * stage + 1) * TILE, dy_rows, tile * N);
        commit_copies();
    };
    const auto statistics_of = [&](int row) { return row_statistics(sizes, logsumexp, delta, b, g, row); };
    const auto keep = [&](float2 of_row, int stage) {
        if (threadIdx.x < N) {
            statistics[2 * stage * N + threadIdx.x] = of_row.x;
            statistics[(2 * stage + 1) * N + threadIdx.x] = of_row.y;
        }
    };

    float k_sum[M<W>][W / 8][4] = {}, v_sum[M<W>][W / 8][4] = {};
    int stage = 0;
    for (int chunk = 0; chunk * N < n_rows; chunk += TILES) {
        Visits visits = look_ahead<N, THREADS, false>(of_rows, chunk, row_positions, range, sight);
        if (visits.due) {
            const int tile = chunk + __ffs(visits.due) - 1;
            fetch(tile, stage);
            if (threadIdx.x < N) keep(statistics_of(tile * N + threadIdx.x), stage);
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
                if (threadIdx.x < N) of_next = statistics_of(next * N + threadIdx.x);
            }

            const bf16* q_tile = stages + 2 * stage * TILE;
            const bf16* dy_tile = q_tile + TILE;
            float p[M<W>][N / 8][4] = {}, ds[M<W>][N / 8][4] = {};  // [keys][rows]
            multiply_rows<W, M<W>, N>(p, k_tile + warp_key * STRIDE<W>, q_tile);
            if (!(visits.clear >> tile & 1)) hide<M<W>, N, false>(p, key_positions + warp_key, row_positions + tile * N, sight);
            multiply_rows<W, M<W>, N>(ds, v_tile + warp_key * STRIDE<W>, dy_tile);
#pragma unroll
            for (int n = 0; n < N / 8; n++) {
                const float* of_columns = statistics + 2 * stage * N + 8 * n + lane % 4 * 2;
                const float2 lse = *reinterpret_cast<const float2*>(of_columns);
                const float2 mean = *reinterpret_cast<const float2*>(of_columns + N);
#pragma unroll
                for (int m = 0; m < M<W>; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        p[m][n][i] = exp2_approx(p[m][n][i] * factor - (i % 2 ? lse.y : lse.x));
                        ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - (i % 2 ? mean.y : mean.x));
                    }
            }
            unsigned weights[M<W>][N / 16][4];
            round_scores<M<W>, N>(weights, p);
            multiply_scores<W, M<W>, N>(v_sum, weights, dy_tile);
            round_scores<M<W>, N>(weights, ds);
            multiply_scores<W, M<W>, N>(k_sum, weights, q_tile);
            if (STAGES<W> == 2) stage ^= 1;
            else __syncthreads();  // all are done with the one stage
            if (visits.due) {
                if (STAGES<W> == 1) fetch(next, stage);
                keep(of_next, stage);
            }
        }
    }
    commit_copies();  // of the keys, where no row saw them
    wait_for_copies<0>();
    __syncthreads();

#pragma unroll
    for (int m = 0; m < M<W>; m++)
#pragma unroll
        for (int c = 0; c < W / 8; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) k_sum[m][c][i] *= scale;
    store_rows<W, M<W>>(k_sum, k_tile + warp_key * STRIDE<W>, sizes.keys(dk, width, b, g), first_key + warp_key);
    store_rows<W, M<W>>(v_sum, v_tile + warp_key * STRIDE<W>, sizes.keys(dv, v_width, b, g), first_key + warp_key);
}
