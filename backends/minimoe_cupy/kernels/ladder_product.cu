// A ladder of grouped products, to be read from top to bottom: bfloat16 in and out, float32 sums. docs/gpu.md has what each rung costs.
//
// y[r] = W_e x[r] for the rows r of expert e.   x [R,K], weight [E,N,K], offsets [E+1] -> y [R,N]
// Rows are sorted by expert: those of e are offsets[e] .. offsets[e+1]. Rows at or past offsets[E] are not written. FLOPs: 2 R N K.
//
//   product_naive      a thread per result, its operands straight from memory.               Bytes: 4 for each of R N K multiplications.
//   product_shared     32 x 32 results per block, which shares what it loads.                 Bytes: R N K 4 / 32.
//   product_mma        64 x 64 results per block, multiplied by the tensor cores.             Bytes: R N K 4 / 64.
//   grouped_rows_bf16  the one that the backend launches (grouped_bf16.cu, mma_tile.cuh): 128 x 256 results per block, operands copied
//                      in the background several steps ahead, fragments loaded by ldmatrix, results stored 16 bytes at a time.
//
// Grid of each rung here: (row tiles, column tiles, E). An expert has as many row tiles as all R rows together would need, since the host
// does not know how many rows it has; blocks that find no row return at once. K is summed in order, so equal inputs give equal bits.
// Arrays begin at multiples of 16 bytes; all sizes may be odd.
// Reference: minimoe/reference/expert.py.   Unproven: no card has run it.
#include "common.cuh"

// ---- the first rung: the definition -----------------------------------------------------------------------------------------------------
//
// Each thread loads two numbers for one multiplication. Neighbouring lanes of a warp have neighbouring columns n, so they read the same
// x[r,k], which is one access for all; but their weights W[n,k] are K numbers apart, so that one load of a warp touches 32 separate
// pieces of memory.
// Grid: (ceil(R / 8), ceil(N / 32), E), block (32, 8).

__global__ void product_naive(const bf16* x, const bf16* weight, const int* offsets, bf16* y, int depth, int width) {
    const int expert = blockIdx.z, row = offsets[expert] + blockIdx.x * blockDim.y + threadIdx.y;
    const int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (row >= offsets[expert + 1] || column >= width) return;
    const bf16* x_row = x + (long long)row * depth;
    const bf16* weight_row = weight + ((long long)expert * width + column) * depth;
    float sum = 0.0f;
    for (int k = 0; k < depth; k++) sum = fmaf(to_float(x_row[k]), to_float(weight_row[k]), sum);
    y[(long long)row * width + column] = from_float<bf16>(sum);
}

// ---- the second rung: shared memory -----------------------------------------------------------------------------------------------------
//
// The 32 x 32 results of a block need 32 rows of x and 32 rows of W. The block loads 32 columns of both, each number once, into memory that
// its threads share, and each number is then used 32 times. Now the lanes of a warp load along k, which is contiguous in both operands.
// The first barrier: all has been loaded. The second: nobody reads this step's numbers any more, and the next step may overwrite them.
// Grid: (ceil(R / 32), ceil(N / 32), E), block (32, 32).

constexpr int SIDE = 32;

__global__ void __launch_bounds__(SIDE * SIDE) product_shared(
    const bf16* x, const bf16* weight, const int* offsets, bf16* y, int depth, int width
) {
    // A row is one number longer than it has to be: otherwise the 32 lanes that read a column of `ws` would all read from one bank.
    __shared__ float xs[SIDE][SIDE + 1], ws[SIDE][SIDE + 1];
    const int expert = blockIdx.z, first = offsets[expert] + blockIdx.x * SIDE, last = offsets[expert + 1], left = blockIdx.y * SIDE;
    if (first >= last) return;
    const int tx = threadIdx.x, ty = threadIdx.y;
    const bf16* x_row = x + (long long)(first + ty) * depth;
    const bf16* weight_row = weight + ((long long)expert * width + left + ty) * depth;
    float sum = 0.0f;
    for (int start = 0; start < depth; start += SIDE) {
        const int k = start + tx;  // what is outside becomes zero, which adds nothing
        xs[ty][tx] = first + ty < last && k < depth ? to_float(x_row[k]) : 0.0f;
        ws[ty][tx] = left + ty < width && k < depth ? to_float(weight_row[k]) : 0.0f;
        __syncthreads();
        for (int i = 0; i < SIDE; i++) sum = fmaf(xs[ty][i], ws[tx][i], sum);
        __syncthreads();
    }
    if (first + ty < last && left + tx < width) y[(long long)(first + ty) * width + left + tx] = from_float<bf16>(sum);
}

// ---- the third rung: tensor cores -------------------------------------------------------------------------------------------------------
//
// The rung before loads two numbers from shared memory for each multiplication. A tensor core multiplies 16 x 16 by 16 x 8 numbers in
// one instruction of a warp, mma.sync: 2,048 multiplications for 6 registers of operands. The numbers of a matrix are spread over the
// warp's lanes. With g = lane / 4 and t = 2 (lane % 4), a lane has
//
//     of a [16,16], in 4 registers of two neighbours in k: rows g, g + 8, g, g + 8 and from columns t, t, t + 8, t + 8
//     of b [16,8], in 2 registers:                         column g, from rows t and t + 8
//     of c [16,8], in 4 floats:                            row g, columns t and t + 1, then row g + 8, columns t and t + 1
//
// A block is 4 warps, each with 32 x 32 of the 64 x 64 results: 2 x 4 matrices c, 32 floats in each lane. There is one stage: the block
// loads 64 columns of both operands, waits for them, multiplies, waits, and loads again. While it waits for memory, the tensor cores
// have nothing to do.
// Grid: (ceil(R / 64), ceil(N / 64), E), block 128.

constexpr int TILE = 64, STEP = 64, THREADS = 128, WARP_SIDE = 32;
constexpr int PITCH = STEP + CHUNK;  // from row to row: with 16 bytes more, the 8 rows that a warp reads at once are in different banks

// 64 rows of an operand, 64 columns from `start`, into shared memory, 16 bytes at a time; zeros outside.
__device__ inline void load_tile(bf16 (&tile)[TILE][PITCH], const bf16* rows, int n_rows, int depth, int start) {
    for (int i = threadIdx.x; i < TILE * STEP / CHUNK; i += THREADS) {
        const int row = i / (STEP / CHUNK), column = i % (STEP / CHUNK) * CHUNK, inside = row < n_rows ? depth - start - column : 0;
        const bf16* from = rows + (long long)row * depth + start + column;
        if (depth % CHUNK == 0) {
            *reinterpret_cast<uint4*>(&tile[row][column]) = inside > 0 ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
        } else {  // rows that begin anywhere
            for (int j = 0; j < CHUNK; j++) tile[row][column + j] = j < inside ? from[j] : bf16{0};
        }
    }
}

// Two neighbours in one register, as mma.sync takes them.
__device__ inline unsigned two(const bf16* from) { return *reinterpret_cast<const unsigned*>(from); }

__global__ void __launch_bounds__(THREADS) product_mma(
    const bf16* x, const bf16* weight, const int* offsets, bf16* y, int depth, int width
) {
    alignas(16) __shared__ bf16 xs[TILE][PITCH], ws[TILE][PITCH];
    const int expert = blockIdx.z, first = offsets[expert] + blockIdx.x * TILE, last = offsets[expert + 1], left = blockIdx.y * TILE;
    if (first >= last) return;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4 * 2;
    const int m = warp / 2 * WARP_SIDE, n = warp % 2 * WARP_SIDE;  // the warp's results begin here in the tile
    const bf16* x_rows = x + (long long)first * depth;
    const bf16* weight_rows = weight + ((long long)expert * width + left) * depth;
    float sum[2][4][4] = {};
    for (int start = 0; start < depth; start += STEP) {
        load_tile(xs, x_rows, last - first, depth, start);
        load_tile(ws, weight_rows, width - left, depth, start);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < STEP; k += 16) {
            unsigned a[2][4], b[4][2];
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int r = 0; r < 4; r++) a[i][r] = two(&xs[m + 16 * i + g + r % 2 * 8][k + t + r / 2 * 8]);
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int r = 0; r < 2; r++) b[j][r] = two(&ws[n + 8 * j + g][k + t + r * 8]);
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) mma_bf16(sum[i][j], a[i], b[j]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int row = first + m + 16 * i + g + r / 2 * 8, column = left + n + 8 * j + t + r % 2;
                if (row < last && column < width) y[(long long)row * width + column] = from_float<bf16>(sum[i][j][r]);
            }
}
