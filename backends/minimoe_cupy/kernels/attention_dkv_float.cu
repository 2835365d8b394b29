// attention_dkv in float32, the gradients of keys and values:   P = exp(scale q k^T - logsumexp), dS = P * (dy v^T - delta),
//     dk = scale dS^T q, dv = P^T dy      dk [B,Tk,G,C], dv [B,Tk,G,Cv] <- q, k, v, dy as attention_dq_float.cu has them, logsumexp, delta [B,Q,Tq]
// One block per 64 keys of a group, with k and v in shared memory; a thread has 4 of the keys and every eighth row of a tile. The block visits
// the tiles of rows, of all heads of the group, that see its keys. dy is multiplied and released first, so that the next rows of it are copied
// while those of q are used. Scores are computed transposed, [keys][rows]. Each gradient is summed by one block, in the order of the tiles:
// equal inputs give equal bits, without atomics. C and Cv up to W.
// FLOPs: 4 (C + Cv) for each score in a visited tile.   Bytes: k, v, dk and dv once; q and dy once per block that they see, mostly from L2.
// Grid: B * G * ceil(Tk / 64); 128 threads; SHARED bytes of shared memory.
// Reference: minimoe/reference/attention.py.   Unproven: no card has run it.
#include "attention_backward.cuh"
#include "attention_fma.cuh"

extern __shared__ unsigned char dynamic_shared[];

template <int W>
constexpr int OTHER = W < 128 ? 32 : 16;  // rows of a tile: what 99 KB hold
template <int W>
constexpr int SHARED = 4 * (2 * (OWN + OTHER<W>) * STRIDE<W> + OWN * (OTHER<W> + QUAD) + OWN + TILES * (OTHER<W> + 2) + 2 * OTHER<W>);

template <int W>
__global__ void __launch_bounds__(128, 2) attention_dkv_float(
    const float* q, const float* k, const float* v, const float* dy, const float* logsumexp, const float* delta, const int* q_pos,
    const int* k_pos, const bool* k_valid, float* dk, float* dv, int groups, int heads, unsigned inverse, int n_q, int n_k, int width,
    int v_width, float scale, bool causal, int window, int q_pos_step, int k_pos_step, int valid_step, bool vector
) {
    constexpr int N = OTHER<W>;
    float* k_tile = reinterpret_cast<float*>(dynamic_shared);  // [OWN][W]
    float* v_tile = k_tile + OWN * STRIDE<W>;                  // [OWN][W]
    float* q_tile = v_tile + OWN * STRIDE<W>;                  // [N][W]
    float* dy_tile = q_tile + N * STRIDE<W>;                   // [N][W]
    float* weights = dy_tile + N * STRIDE<W> + own_row() * (N + QUAD);
    int* key_positions = reinterpret_cast<int*>(dy_tile + N * STRIDE<W> + OWN * (N + QUAD));
    int* row_positions = key_positions + OWN;
    float* statistics = reinterpret_cast<float*>(row_positions + TILES * N + 2 * TILES);  // logsumexp [N] and delta [N] of the tile

    const Sizes sizes = {groups, heads, inverse, n_q, n_k};
    const int n_rows = n_q * heads, n_tiles = (n_k + OWN - 1) / OWN;
    const int unit = blockIdx.x / n_tiles, b = unit / groups, g = unit % groups, first_key = blockIdx.x % n_tiles * OWN;
    const Positions of_rows = {q_pos + (long long)b * q_pos_step, nullptr, n_rows, inverse};
    const Positions of_keys = {k_pos + (long long)b * k_pos_step, k_valid ? k_valid + (long long)b * valid_step : nullptr, n_k, 0};
    const Sight sight = {causal, window};
    const float factor = scale * LOG2E;

    const TileCopy<W, OWN> copy_keys(sizes.keys(k, width, b, g), vector), copy_values(sizes.keys(v, v_width, b, g), vector);
    copy_keys.clear(k_tile);
    copy_values.clear(v_tile);
    copy_keys(k_tile, first_key);
    copy_values(v_tile, first_key);
    commit_copies();
    const TileCopy<W, N> copy_q(sizes.queries(q, width, b, g), vector), copy_dy(sizes.queries(dy, v_width, b, g), vector);
    copy_q.clear(q_tile);
    copy_dy.clear(dy_tile);
    const Range range = look_at_own<OWN, true>(of_keys, first_key, key_positions);
    const auto statistics_of = [&](int row) { return row_statistics(sizes, logsumexp, delta, b, g, row); };
    const auto keep = [&](float2 of_row) {
        if (threadIdx.x < N) {
            statistics[threadIdx.x] = of_row.x;
            statistics[N + threadIdx.x] = of_row.y;
        }
    };

    float k_sum[ROWS][W / TX] = {}, v_sum[ROWS][W / TX] = {};
    for (int chunk = 0; chunk * N < n_rows; chunk += TILES) {
        Visits visits = look_ahead<N, THREADS, false>(of_rows, chunk, row_positions, range, sight);
        if (visits.due) {
            const int first = (chunk + __ffs(visits.due) - 1) * N;
            copy_dy(dy_tile, first);
            commit_copies();
            copy_q(q_tile, first);
            commit_copies();
            if (threadIdx.x < N) keep(statistics_of(first + threadIdx.x));
        }
        while (visits.due) {
            const int tile = __ffs(visits.due) - 1;
            visits.due &= visits.due - 1;
            const int next = (chunk + __ffs(visits.due) - 1) * N;  // where one is due
            float2 of_next = {};
            if (visits.due && threadIdx.x < N) of_next = statistics_of(next + threadIdx.x);

            float p[ROWS][N / TX] = {}, ds[ROWS][N / TX] = {};  // [keys][rows]
            wait_for_copies<1>();
            __syncthreads();  // dy is there
            multiply_rows<W>(ds, v_tile + own_row() * STRIDE<W>, dy_tile + other_row() * STRIDE<W>);
            wait_for_copies<0>();
            __syncthreads();  // q is there
            multiply_rows<W>(p, k_tile + own_row() * STRIDE<W>, q_tile + other_row() * STRIDE<W>);
            if (!(visits.clear >> tile & 1)) hide<false>(p, key_positions + own_row(), row_positions + tile * N + other_row(), sight);
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < N / TX; j++) {
                    const int column = other_row() + TX * j;
                    const float lse = statistics[column], mean = statistics[N + column];
                    p[i][j] = exp2_approx(p[i][j] * factor - lse);
                    ds[i][j] = p[i][j] * (ds[i][j] - mean);
                }
            put_scores(weights, p);
            multiply_scores<W, N>(v_sum, weights, dy_tile);
            __syncthreads();
            if (visits.due) copy_dy(dy_tile, next);
            commit_copies();
            put_scores(weights, ds);
            multiply_scores<W, N>(k_sum, weights, q_tile);
            __syncthreads();
            if (visits.due) copy_q(q_tile, next);
            commit_copies();
            keep(of_next);
        }
    }
    wait_for_copies<0>();  // of the keys, where no row saw them

#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int c = 0; c < W / TX; c++) k_sum[i][c] *= scale;
    store_rows<W>(k_sum, sizes.keys(dk, width, b, g), first_key + own_row(), vector);
    store_rows<W>(v_sum, sizes.keys(dv, v_width, b, g), first_key + own_row(), vector);
}
