// attention_dq in float32, the gradient of the queries:   P = exp(scale q k^T - logsumexp), dS = P * (dy v^T - delta), dq = scale dS k
//     dq [B,Tq,Q,C] <- q [B,Tq,Q,C], k [B,Tk,G,C], v [B,Tk,G,Cv], dy [B,Tq,Q,Cv], logsumexp [B,Q,Tq], delta [B,Q,Tq]
// One block per 64 rows of a group, with q and dy in shared memory; a thread has 4 of the rows and every eighth key of a tile. The block
// visits the tiles of keys and values that its rows see. Values are multiplied and released first, so that the next ones are copied while the
// keys are used. Each dq is summed by one block, in the order of the tiles: equal inputs give equal bits, without atomics. C and Cv up to W.
// FLOPs: 4 C + 2 Cv for each score in a visited tile.   Bytes: q, dy and dq once; k and v once per block that sees them, mostly from L2.
// Grid: B * G * ceil(Tq Q/G / 64), the last rows first; 128 threads; SHARED bytes of shared memory.
// Reference: minimoe/reference/attention.py.   Unproven: no card has run it.
#include "attention_backward.cuh"
#include "attention_fma.cuh"

extern __shared__ unsigned char dynamic_shared[];

template <int W>
constexpr int OTHER = W < 128 ? 32 : 16;  // keys of a tile: what 99 KB hold
template <int W>
constexpr int SHARED = 4 * (2 * (OWN + OTHER<W>) * STRIDE<W> + OWN * (OTHER<W> + QUAD) + OWN + TILES * (OTHER<W> + 2));

template <int W>
__global__ void __launch_bounds__(128, 2) attention_dq_float(
    const float* q, const float* k, const float* v, const float* dy, const float* logsumexp, const float* delta, const int* q_pos,
    const int* k_pos, const bool* k_valid, float* dq, int groups, int heads, unsigned inverse, int n_q, int n_k, int width, int v_width,
    float scale, bool causal, int window, int q_pos_step, int k_pos_step, int valid_step, bool vector
) {
    constexpr int N = OTHER<W>;
    float* q_tile = reinterpret_cast<float*>(dynamic_shared);  // [OWN][W]
    float* dy_tile = q_tile + OWN * STRIDE<W>;                 // [OWN][W]
    float* k_tile = dy_tile + OWN * STRIDE<W>;                 // [N][W]
    float* v_tile = k_tile + N * STRIDE<W>;                    // [N][W]
    float* weights = v_tile + N * STRIDE<W> + own_row() * (N + QUAD);
    int* row_positions = reinterpret_cast<int*>(v_tile + N * STRIDE<W> + OWN * (N + QUAD));
    int* key_positions = row_positions + OWN;

    const Sizes sizes = {groups, heads, inverse, n_q, n_k};
    const int n_rows = n_q * heads, n_tiles = (n_rows + OWN - 1) / OWN;
    const int unit = blockIdx.x / n_tiles, b = unit / groups, g = unit % groups;
    const int first_row = (n_tiles - 1 - int(blockIdx.x % n_tiles)) * OWN;
    const Positions of_rows = {q_pos + (long long)b * q_pos_step, nullptr, n_rows, inverse};
    const Positions of_keys = {k_pos + (long long)b * k_pos_step, k_valid ? k_valid + (long long)b * valid_step : nullptr, n_k, 0};
    const Sight sight = {causal, window};
    const float factor = scale * LOG2E;

    const TileCopy<W, OWN> copy_q(sizes.queries(q, width, b, g), vector), copy_dy(sizes.queries(dy, v_width, b, g), vector);
    copy_q.clear(q_tile);
    copy_dy.clear(dy_tile);
    copy_q(q_tile, first_row);
    copy_dy(dy_tile, first_row);
    commit_copies();
    const TileCopy<W, N> copy_keys(sizes.keys(k, width, b, g), vector), copy_values(sizes.keys(v, v_width, b, g), vector);
    copy_keys.clear(k_tile);
    copy_values.clear(v_tile);
    const Range range = look_at_own<OWN, false>(of_rows, first_row, row_positions);
    float2 statistics[ROWS];  // of this thread's rows
#pragma unroll
    for (int i = 0; i < ROWS; i++) statistics[i] = row_statistics(sizes, logsumexp, delta, b, g, first_row + own_row() + i);

    float sum[ROWS][W / TX] = {};
    for (int chunk = 0; chunk * N < n_k; chunk += TILES) {
        Visits visits = look_ahead<N, THREADS, true>(of_keys, chunk, key_positions, range, sight);
        if (visits.due) {
            const int first = (chunk + __ffs(visits.due) - 1) * N;
            copy_values(v_tile, first);
            commit_copies();
            copy_keys(k_tile, first);
            commit_copies();
        }
        while (visits.due) {
            const int tile = __ffs(visits.due) - 1;
            visits.due &= visits.due - 1;
            const int next = (chunk + __ffs(visits.due) - 1) * N;  // where one is due

            float p[ROWS][N / TX] = {}, ds[ROWS][N / TX] = {};
            wait_for_copies<1>();
            __syncthreads();  // the values are there
            multiply_rows<W>(ds, dy_tile + own_row() * STRIDE<W>, v_tile + other_row() * STRIDE<W>);
            wait_for_copies<0>();
            __syncthreads();  // the keys are there, and all are done with the values
            multiply_rows<W>(p, q_tile + own_row() * STRIDE<W>, k_tile + other_row() * STRIDE<W>);
            if (!(visits.clear >> tile & 1)) hide<true>(p, row_positions + own_row(), key_positions + tile * N + other_row(), sight);
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < N / TX; j++) {
                    p[i][j] = exp2_approx(p[i][j] * factor - statistics[i].x);
                    ds[i][j] = p[i][j] * (ds[i][j] - statistics[i].y);
                }
            __syncthreads();
            if (visits.due) copy_values(v_tile, next);
            commit_copies();
            put_scores(weights, ds);
            multiply_scores<W, N>(sum, weights, k_tile);
            __syncthreads();
            if (visits.due) copy_keys(k_tile, next);
            commit_copies();
        }
    }
    wait_for_copies<0>();  // of the rows, where no key was seen

#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int c = 0; c < W / TX; c++) sum[i][c] *= scale;
    store_rows<W>(sum, sizes.queries(dq, width, b, g), first_row + own_row(), vector);
}
