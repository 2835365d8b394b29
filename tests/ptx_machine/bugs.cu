// Kernels with one planted bug each, and one without, which show what the machine finds. x [64], y [64]; one block of 64.

__global__ void reverse_block(const float* x, float* y) {
    __shared__ float tile[64];
    tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = tile[63 - threadIdx.x];
}

__global__ void missing_barrier(const float* x, float* y) {
    __shared__ float tile[64];
    tile[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = tile[63 - threadIdx.x];
}

__global__ void barrier_in_a_branch(const float* x, float* y) {
    if (threadIdx.x < 32) __syncthreads();
    y[threadIdx.x] = x[threadIdx.x];
}

__global__ void half_a_warp(const float* x, float* y) {
    if (threadIdx.x % 32 < 16) __syncthreads();
    y[threadIdx.x] = x[threadIdx.x];
}

__global__ void mask_of_all(const float* x, float* y) {
    if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
}

__global__ void lane_outside_its_mask(const float* x, float* y) { y[threadIdx.x] = __shfl_xor_sync(0xffffu, x[threadIdx.x], 1); }

__global__ void different_operations(const float* x, float* y) {
    // clang-format off
    y[threadIdx.x] = threadIdx.x % 2 ? __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1) : float(__any_sync(0xffffffffu, x[threadIdx.x] > 0.0f));
    // clang-format on
}

__global__ void row_too_far(const float* x, float* y) { y[threadIdx.x + 1] = x[threadIdx.x]; }

__global__ void row_before(const float* x, float* y) { y[int(threadIdx.x) - 1] = x[threadIdx.x]; }

__global__ void read_too_far(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 1]; }

__global__ void read_far_away(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 128]; }

__global__ void undefined_shift(const float* x, float* y) { y[threadIdx.x] = float(1 << int(x[threadIdx.x] + 1.0f)); }

__global__ void uninitialised(const float* x, float* y) {
    __shared__ float tile[64];
    if (threadIdx.x) tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x];
}

template <int UNUSED>
__global__ void uninitialised_dynamic(const float* x, float* y) {
    extern __shared__ unsigned char dynamic_shared[];
    float* tile = reinterpret_cast<float*>(dynamic_shared);
    if (threadIdx.x) tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x];
}

__global__ void uninitialised_global(const float* x, float* y) {
    if (threadIdx.x % 2) y[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x / 2 * 2] = y[threadIdx.x] + 1.0f;
}

__global__ void misaligned(const float* x, float* y) {
    if (threadIdx.x == 0) *reinterpret_cast<float4*>(y) = *reinterpret_cast<const float4*>(x + 1);
}

__global__ void blocks_race(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x] + float(blockIdx.x); }

__global__ void lanes_race(const float* x, float* y) {
    __shared__ float tile[64];
    tile[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = tile[threadIdx.x ^ 1];
}

__global__ void loop_without_end(const float* x, float* y) {
    volatile float* out = y;
    while (x[threadIdx.x] > 0.0f) out[threadIdx.x] = 1.0f;
}

__global__ void division_by_zero(const float* x, float* y) { y[threadIdx.x] = float(100 / (int(x[threadIdx.x]) - 7)); }
