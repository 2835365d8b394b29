// attention_backward in float32:   P = exp(scale q k^T - logsumexp), dS = P * (dy v^T - delta),
//     KEYS: dk = scale dS^T q, dv = P^T dy             [B,Tk,G,C], [B,Tk,G,Cv] <- q, k, v, dy, logsumexp [B,Q,Tq], delta [B,Q,Tq]
//     else: dq = scale dS k                            [B,Tq,Q,C]
// One text for both, in which a block has a tile of its own, of keys (k, v) or rows (q, dy), and meets tiles of the other kind. Scores are made
// with the own tile on the left, and a gradient is summed by one block in the order of the tiles, which for a key is that of the rows of all
// heads that read it: equal inputs give equal bits, without atomics. The other tile's values are multiplied first and let go first, so that
// the next ones are on their way while the rest is done.
// Grid: KEYS: B * G * ceil(Tk / 64), else B * G * ceil(Tq Q/G / 64), the last rows first; 128 threads. C and Cv up to W.
// FLOPs: for each score in a visited tile 4 (C + Cv) with KEYS, else 4 C + 2 Cv.   Bytes: the own tile once, the others from the second cache.
// Shared: ((128 + 2 N) (W + 4) + 64 (N + 4) + 64 + 32 N + 64 + 2 N) * 4.   Defined in minimoe/reference/attention.py.
#include "attention_fma.cuh"

extern __shared__ unsigned char dynamic_shared[];

template <int W>
constexpr int OTHER = W < 128 ? 32 : 16;  // what 99 KB hold (attention.py has the same numbers)

template <int W, bool KEYS>
__global__ void __launch_bounds__(128, 2) attention_backward_float(
    const float* q, const float* k, const float* v, const float* dy, const float* logsumexp, const float* delta, const int* q_pos,
    const int* k_pos, const bool* k_valid, float* gradient, float* dv, int groups, int heads, unsigned inverse, int n_q, int n_k, int width,
    int v_width, float scale, bool causal, int window, int q_pos_step, int k_pos_step, int valid_step, bool vector
) {
    constexpr int N = OTHER<W>;
    float* own = reinterpret_cast<float*>(dynamic_shared);  // keys, or rows of q
    float* own_values = own + OWN * STRIDE<W>;              // values, or rows of dy
    float* other = own_values + OWN * STRIDE<W>;
    float* other_values = other + N * STRIDE<W>;
    float* weights = other_values + N * STRIDE<W> + own_row() * (N + QUAD);
    int* own_positions = reinterpret_cast<int*>(other_values + N * STRIDE<W> + OWN * (N + QUAD));
    int* positions = own_positions + OWN;
    float* statistics = reinterpret_cast<float*>(positions + TILES * N + 2 * TILES);  // KEYS: logsumexp and delta of the other tile

    const Shape shape = {groups, heads, inverse, n_q, n_k};
    const int n_own = KEYS ? n_k : n_q * heads, n_other = KEYS ? n_q * heads : n_k, n_tiles = (n_own + OWN - 1) / OWN;
    const int unit = blockIdx.x / n_tiles, b = unit / groups, g = unit % groups, place = blockIdx.x % n_tiles;
    const int first = (KEYS ? place : n_tiles - 1 - place) * OWN;
    const Rows<const float> q_rows = shape.queries(q, width, b, g), dy_rows = shape.queries(dy, v_width, b, g);
    const Rows<const float> k_rows = shape.keys(k, width, b, g), v_rows = shape.keys(v, v_width, b, g);
    const Positions of_rows = {q_pos + (long long)b * q_pos_step, nullptr, n_q * heads, inverse};
    const Positions of_keys = {k_pos + (long long)b * k_pos_step, k_valid ? k_valid + (long long)b * valid_step : nullptr, n_k, 0};
    const Sight sight = {causal, window};
    const float factor = scale * LOG2E;

    copy_rows<W, OWN>(own, KEYS ? k_rows : q_rows, first, vector);
    copy_rows<W, OWN>(own_values, KEYS ? v_rows : dy_rows, first, vector);
    commit_copies();
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
    const auto keep = [&](float2 of_row) {
        if (KEYS && threadIdx.x < N) {
            statistics[threadIdx.x] = of_row.x;
            statistics[N + threadIdx.x] = of_row.y;
        }
    };
    float2 of_own[ROWS];
    if (!KEYS) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) of_own[i] = statistics_of(first + own_row() + i);
    }

    float sum[ROWS][W / TX] = {}, v_sum[KEYS ? ROWS : 1][W / TX] = {};
    for (int chunk = 0; chunk * N < n_other; chunk += TILES) {
        Visits visits = look_ahead<N, THREADS, !KEYS>(KEYS ? of_rows : of_keys, chunk, positions, range, sight);
        if (visits.due) {
            const int here = (chunk + __ffs(visits.due) - 1) * N;
            copy_rows<W, N>(other_values, KEYS ? dy_rows : v_rows, here, vector);
            commit_copies();
            copy_rows<W, N>(other, KEYS ? q_rows : k_rows, here, vector);
            commit_copies();
            if (KEYS && threadIdx.x < N) keep(statistics_of(here + threadIdx.x));
        }
        while (visits.due) {
            const int tile = __ffs(visits.due) - 1;
            visits.due &= visits.due - 1;
            const int next = (chunk + __ffs(visits.due) - 1) * N;  // where one is due
            float2 of_next = {};
            if (KEYS && visits.due && threadIdx.x < N) of_next = statistics_of(next + threadIdx.x);

            float p[ROWS][N / TX] = {}, ds[ROWS][N / TX] = {};
            wait_for_copies<1>();
            __syncthreads();  // the values are there
            multiply_rows<W>(ds, own_values + own_row() * STRIDE<W>, other_values + other_row() * STRIDE<W>);
            wait_for_copies<0>();
            __syncthreads();  // all is there
            multiply_rows<W>(p, own + own_row() * STRIDE<W>, other + other_row() * STRIDE<W>);
            if (!(visits.clear >> tile & 1)) hide<!KEYS>(p, own_positions + own_row(), positions + tile * N + other_row(), sight);
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < N / TX; j++) {
                    const int column = other_row() + TX * j;
                    const float lse = KEYS ? statistics[column] : of_own[i].x, mean = KEYS ? statistics[N + column] : of_own[i].y;
                    p[i][j] = exp2_approx(p[i][j] * factor - lse);
                    ds[i][j] = p[i][j] * (ds[i][j] - mean);
                }
            if constexpr (KEYS) {
                put_scores(weights, p);
                multiply_scores<W, N>(v_sum, weights, other_values);
            }
            __syncthreads();
            if (visits.due) copy_rows<W, N>(other_values, KEYS ? dy_rows : v_rows, next, vector);
            commit_copies();
            put_scores(weights, ds);
            multiply_scores<W, N>(sum, weights, other);
            __syncthreads();
            if (visits.due) copy_rows<W, N>(other, KEYS ? q_rows : k_rows, next, vector);
            commit_copies();
            keep(of_next);
        }
    }
    wait_for_copies<0>();  // of the own tile, where nothing was seen

#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int c = 0; c < W / TX; c++) sum[i][c] *= scale;
    store_rows<W>(sum, KEYS ? shape.keys(gradient, width, b, g) : shape.queries(gradient, width, b, g), first + own_row(), vector);
    if constexpr (KEYS) store_rows<W>(v_sum, shape.keys(dv, v_width, b, g), first + own_row(), vector);
}
