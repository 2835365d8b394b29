// What the machine must do as a device does: votes, shuffles, barriers that count, bfloat16, the lane layouts of tensor cores.
#include "common.cuh"

// y [14,32]: one warp; each operation writes a row.
__global__ void warp_operations(const int* x, int* y) {
    const int lane = threadIdx.x, value = x[lane];
    const unsigned all = 0xffffffffu;
    y[lane] = __shfl_sync(all, value, 5);
    y[32 + lane] = __shfl_sync(all, value, lane + 1, 8);
    y[64 + lane] = __shfl_up_sync(all, value, 3);
    y[96 + lane] = __shfl_down_sync(all, value, 3, 16);
    y[128 + lane] = __shfl_xor_sync(all, value, 21);
    y[160 + lane] = int(__ballot_sync(all, value % 3 == 0));
    y[192 + lane] = __any_sync(all, value == 7);
    y[224 + lane] = __all_sync(all, value >= 0);
    y[256 + lane] = int(__match_any_sync(all, unsigned(value % 4)));
    y[288 + lane] = __popc(unsigned(value));
    y[320 + lane] = __clz(value);
    y[352 + lane] = __ffs(value);
    y[384 + lane] = __syncthreads_count(value % 2);
    y[416 + lane] = __syncthreads_or(value > 1000) + 2 * __syncthreads_and(value >= 0);
}

template <class T>
__global__ void round_trip(const float* x, T* y) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = from_float<T>(x[i]);
}

// c [16,8] = a [16,16] b [16,8], through shared memory as a product does it.
__global__ void tile_product(const bf16* a, const bf16* b, float* c) {
    __shared__ __align__(16) bf16 left[16][16], right[16][8];
    for (int i = threadIdx.x; i < 256; i += 32) left[i / 16][i % 16] = a[i];
    for (int i = threadIdx.x; i < 128; i += 32) right[i / 8][i % 8] = b[i];
    __syncthreads();
    const int lane = threadIdx.x;
    unsigned from_a[4], both[4];  // the second half of `both` is not used: b has 8 columns
    float sums[4] = {};
    ldmatrix_x4(from_a, &left[lane % 16][lane / 16 * 8]);
    ldmatrix_x4_transposed(both, &right[lane % 16][0]);
    const unsigned from_b[2] = {both[0], both[1]};
    mma_bf16(sums, from_a, from_b);
    for (int i = 0; i < 4; i++) c[(lane / 4 + 8 * (i / 2)) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// The three axes of a launch.   y [grid z, y, x, block z, y, x]
__global__ void indices(int* y) {
    const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    y[block * int(blockDim.x * blockDim.y * blockDim.z) + thread] = block * 1000 + thread;
}
