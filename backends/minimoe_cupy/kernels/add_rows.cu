// Adds rows to the rows that ids name; the ids are sorted (sort.cu): target[key] += sum of values[turn[i]] over keys[i] = key.
//                                                                                              target [V,D] <- values [N,D], keys, turn [N]
// The sorted order is cut into pieces of fixed length. One warp adds a run of equal keys within a piece (32 V columns of it), in the order in
// which the ids came. A run that crosses a cut leaves a sum in each of its pieces: partial [pieces,2,D] holds first the sum of the run that came
// from the piece before, then that of the run that continues into the next.
//   sum_pieces   one warp per piece and 32 V columns: complete runs go to their row, the rest to `partial`
//   join_pieces  one block per piece whose last run begins there and continues: each warp adds a share of its sums, then the warps in order
// So one shape and one set of ids have one order of summation, and no row waits for N additions. Sums are float (double for double) and are
// rounded to T once. Keys equal to `rows` (an id that names no row) or to `skip` add nothing, and their values are not read.
// Bytes: N D sizeof(T) read, the named rows written (and read, if `accumulate`); 8 D per piece in between.   Grids: with each kernel.
// Reference: minimoe/reference/arrays.py (scatter_add) and minimoe/reference/embedding.py.   Unproven: no card has run it.
#include "common.cuh"

constexpr int WARPS = 8, JOIN_WARPS = 16;
constexpr int BATCH = 4;  // rows that a warp loads at a time
constexpr int NONE = -1;  // no key

__device__ inline void load(const double* from, double (&to)[1]) { to[0] = *from; }
__device__ inline void store(double* to, const double (&from)[1]) { *to = from[0]; }

__device__ inline void load_sums(const double* from, double (&to)[1]) { load(from, to); }
__device__ inline void store_sums(double* to, const double (&from)[1]) { store(to, from); }

// Stores a sum in target, or adds it to target.
template <class T, class Wide, int V>
__device__ inline void put(T* target, const Wide (&sum)[V], bool accumulate) {
    Wide total[V] = {};
    if (accumulate) load(target, total);
#pragma unroll
    for (int i = 0; i < V; i++) total[i] += sum[i];
    store(target, total);
}

// Grid: (ceil(pieces / WARPS), pieces of D), block 32 * WARPS.
template <class T, class Wide, int V>
__global__ void sum_pieces(
    const T* __restrict__ values, const int* __restrict__ keys, const int* __restrict__ turn, T* target, Wide* partial, int count,
    int piece, int rows, int skip, int width, bool accumulate
) {
    const int lane = threadIdx.x % WARP;
    const long long number = (long long)blockIdx.x * WARPS + threadIdx.x / WARP, first = number * piece;
    if (first >= count) return;  // the same for all lanes of a warp
    const int length = int(min((long long)piece, count - first));
    const int before = first ? keys[first - 1] : NONE, after = first + length < count ? keys[first + length] : NONE;
    for (unsigned block = blockIdx.y * WARP * V; block < unsigned(width); block += gridDim.y * WARP * V) {
        const unsigned column = block + lane * V;
        const bool inside = column < unsigned(width);
        Wide sum[V] = {};
        int key = NONE;
        auto finish = [&] {
            if (key == NONE || !inside) return;
            if (key == before) store_sums(partial + 2 * number * width + column, sum);
            else if (key == after) store_sums(partial + (2 * number + 1) * width + column, sum);
            else put(target + (long long)key * width + column, sum, accumulate);
        };
        for (int begin = 0; begin < length; begin += WARP) {
            const bool here = begin + lane < length;
            const int found = here ? keys[first + begin + lane] : NONE, from = here ? turn[first + begin + lane] : 0;
            const int mine = found == rows || found == skip ? NONE : found;
#pragma unroll 1
            for (int j = 0; j < WARP; j += BATCH) {
                Wide part[BATCH][V] = {};
                int owner[BATCH];
#pragma unroll
                for (int b = 0; b < BATCH; b++) {
                    owner[b] = __shfl_sync(ALL_LANES, mine, j + b);
                    const long long row = __shfl_sync(ALL_LANES, from, j + b);
                    if (owner[b] != NONE && inside) load(values + row * width + column, part[b]);
                }
#pragma unroll
                for (int b = 0; b < BATCH; b++) {
                    if (owner[b] != key) {
                        finish();
                        key = owner[b];
#pragma unroll
                        for (int i = 0; i < V; i++) sum[i] = 0;
                    }
#pragma unroll
                    for (int i = 0; i < V; i++) sum[i] += part[b][i];
                }
            }
        }
        finish();
    }
}

// Grid: (pieces - 1, pieces of D), block 32 * JOIN_WARPS.
template <class T, class Wide, int V>
__global__ void __launch_bounds__(32 * JOIN_WARPS) join_pieces(
    const int* __restrict__ keys, const Wide* __restrict__ partial, T* target, int count, int piece, int rows, int skip, int width,
    bool accumulate
) {
    __shared__ Wide sums[JOIN_WARPS][WARP][V];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, number = blockIdx.x;
    const long long first = (long long)number * piece, next = first + piece;
    const int key = keys[next - 1];
    if (key != keys[next] || key == rows || key == skip || (first && keys[first - 1] == key)) return;  // the same for all of the block
    int last = number + 1, end = int((count + (long long)piece - 1) / piece);  // the last piece that begins within the run
    while (end - last > 1) {
        const int middle = (last + end) / 2;
        if (keys[(long long)middle * piece] == key) last = middle;
        else end = middle;
    }
    const int share = (last - number + JOIN_WARPS - 1) / JOIN_WARPS;
    const int begin = number + 1 + warp * share, stop = min(last + 1, begin + share);
    for (unsigned block = blockIdx.y * WARP * V; block < unsigned(width); block += gridDim.y * WARP * V) {
        const unsigned column = block + lane * V;
        Wide sum[V] = {}, part[V];
        if (column < unsigned(width)) {
#pragma unroll 4
            for (int p = begin; p < stop; p++) {
                load_sums(partial + 2ll * p * width + column, part);
#pragma unroll
                for (int i = 0; i < V; i++) sum[i] += part[i];
            }
        }
#pragma unroll
        for (int i = 0; i < V; i++) sums[warp][lane][i] = sum[i];
        __syncthreads();
        if (warp == 0 && column < unsigned(width)) {
            load_sums(partial + (2ll * number + 1) * width + column, sum);
            for (int w = 0; w < JOIN_WARPS; w++) {
#pragma unroll
                for (int i = 0; i < V; i++) sum[i] += sums[w][lane][i];
            }
            put(target + (long long)key * width + column, sum, accumulate);
        }
        __syncthreads();  // before the next columns' sums
    }
}
