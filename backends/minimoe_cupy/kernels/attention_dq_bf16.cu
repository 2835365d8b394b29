// attention_dq in bfloat16, the gradient of the queries:   P = exp(scale q k^T - logsumexp), dS = P * (dy v^T - delta), dq = scale dS k
//     dq [B,Tq,Q,C] <- q [B,Tq,Q,C], k [B,Tk,G,C], v [B,Tk,G,Cv], dy [B,Tq,Q,Cv], logsumexp [B,Q,Tq], delta [B,Q,Tq]
// One block per OWN rows of a group, with q and dy in shared memory; each of its 4 warps has 16 M of the rows. The block visits the tiles of
// keys and values that its rows see. The next tile is copied in the background where two stages fit into 99 KB, which every card has;
// elsewhere other blocks work meanwhile. dS stays in registers, as the left side of the product with k. Each dq is summed by one block, in
// the order of the tiles: equal inputs give equal bits, without atomics. C and Cv up to W, rows at multiples of 16 bytes.
// FLOPs: 4 C + 2 Cv for each score in a visited tile.   Bytes: q, dy and dq once; k and v once per block that sees them, mostly from L2.
// Grid: B * G * ceil(Tq Q/G / OWN), the last rows first; 128 threads; SHARED bytes of shared memory.
// Reference: minimoe/reference/attention.py.   Unproven: no card has run it.
#include "attention_backward.cuh"
#include "attention_mma.cuh"

extern __shared__ unsigned char dynamic_shared[];

constexpr int M = 2, OWN = 16 * M * WARPS;
template <int W>
constexpr int OTHER = W <= 64 ? 64 : 32;  // keys of a tile: what 255 registers allow
template <int W>
constexpr int STAGES = W <= 64 ? 2 : 1;  // what 99 KB hold
template <int W>
constexpr int SHARED = 4 * (OWN + STAGES<W> * OTHER<W>) * STRIDE<W> + 4 * (OWN + TILES * (OTHER<W> + 2));

template <int W>
__global__ void __launch_bounds__(128) attention_dq_bf16(
    const bf16* q, const bf16* k, const bf16* v, const bf16* dy, const float* logsumexp, const float* delta, const int* q_pos,
    const int* k_pos, const bool* k_valid, bf16* dq, int groups, int heads, unsigned inverse, int n_q, int n_k, int width, int v_width,
    float scale, bool causal, int window, int q_pos_step, int k_pos_step, int valid_step
) {
    constexpr int N = OTHER<W>, TILE = N * STRIDE<W>;
    bf16* q_tile = reinterpret_cast<bf16*>(dynamic_shared);  // [OWN][W]
    bf16* dy_tile = q_tile + OWN * STRIDE<W>;                // [OWN][W]
    bf16* stages = dy_tile + OWN * STRIDE<W>;                // STAGES of keys [N][W] and values [N][W]
    int* row_positions = reinterpret_cast<int*>(stages + 2 * STAGES<W> * TILE);
    int* key_positions = row_positions + OWN;

    const Sizes sizes = {groups, heads, inverse, n_q, n_k};
    const auto place = [&] { return Place::of_block<OWN, true>(groups, n_q * heads); };
    const Place at = place();
    const Sight sight = {causal, window};
    const int warp_row = threadIdx.x / WARP * 16 * M, lane = threadIdx.x % WARP;
    const float factor = scale * LOG2E;

    const TileCopy<W, OWN, 2> copy_own({sizes.queries(q, width, at.b, at.g), sizes.queries(dy, v_width, at.b, at.g)});
    copy_own.clear(q_tile);
    copy_own(q_tile, at.first);
    const Range range = look_at_own<OWN, false>({q_pos + (long long)at.b * q_pos_step, nullptr, n_q * heads, inverse}, at.first, row_positions);
    const TileCopy<W, N, 2> copy({sizes.keys(k, width, at.b, at.g), sizes.keys(v, v_width, at.b, at.g)});
    copy.clear(stages);
    if (STAGES<W> == 2) copy.clear(stages + 2 * TILE);
    const auto fetch = [&](int tile, int stage) {
        copy(stages + stage, tile * N);
        commit_copies();
    };
    float offset[M][2], mean[M][2];  // of this lane's rows: -logsumexp in base 2, and delta
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = at.first + warp_row + 16 * m + lane / 4 + 8 * half;
            const float2 both = row_statistics(sizes, logsumexp, delta, at.b, at.g, row);
            offset[m][half] = -both.x;
            mean[m][half] = both.y;
        }
    const bf16* q_left = q_tile + warp_row * STRIDE<W> + straight_lane<W>();
    const bf16* dy_left = q_left + OWN * STRIDE<W>;
    const bf16* keys_transposed = stages + kept(transposed_lane<W>());
    const bf16* keys = stages + kept(straight_lane<W>());

    constexpr int OTHER_STAGE = STAGES<W> == 2 ? 2 * TILE : 0;
    float sum[M][W / 8][4] = {};
    int stage = 0;  // where it begins: 0 or 2 TILE
    for (int chunk = 0; chunk * N < n_k; chunk += TILES) {
        const long long sequence = place().b;
        const Positions of_keys = {k_pos + sequence * k_pos_step, k_valid ? k_valid + sequence * valid_step : nullptr, n_k, 0};
        Visits visits = look_ahead<N, THREADS, true>(of_keys, chunk, key_positions, range, sight);
        int tile = __ffs(visits.due) - 1;
        if (visits.due) fetch(chunk + tile, stage);
        while (visits.due) {
            const bool clear = visits.clear & visits.due & -visits.due;
            visits.due &= visits.due - 1;
            wait_for_copies<0>();
            __syncthreads();
            const int next = __ffs(visits.due) - 1;
            if (STAGES<W> == 2 && visits.due) fetch(chunk + next, stage ^ OTHER_STAGE);

            float p[M][N / 8][4] = {}, ds[M][N / 8][4] = {};
            multiply_rows<W, M, N>(p, q_left, keys_transposed + stage);
            if (!clear) hide<M, N, true>(p, row_positions + warp_row, key_positions + tile * N, sight);
            multiply_rows<W, M, N>(ds, dy_left, keys_transposed + stage + TILE);
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        p[m][n][i] = exp2_approx(fmaf(p[m][n][i], factor, offset[m][i / 2]));
                        ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - mean[m][i / 2]);
                    }
            unsigned weights[M][N / 16][4];
            round_scores<M, N>(weights, ds);
            multiply_scores<W, M, N>(sum, weights, keys + stage);
            stage ^= OTHER_STAGE;
            if (STAGES<W> == 1) {
                __syncthreads();  // all are done with the one stage
                if (visits.due) fetch(chunk + next, stage);
            }
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
        for (int c = 0; c < W / 8; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[m][c][i] *= scale;
    store_rows<W, M>(sum, q_tile + warp_row * STRIDE<W>, sizes.queries(dq, width, b, g), first_row + warp_row);
}
