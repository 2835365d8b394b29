// Wrappers of PTX for sm_90a, apart from ptx.cuh because that compiles for every card.
#pragma once
#include "ptx.cuh"

using mbarrier = unsigned long long;  // in shared memory

// What this thread wrote to shared memory becomes visible to the tensor cores; a barrier must follow before another thread has it read.
__device__ inline void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void mbarrier_init(mbarrier* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// One of the arrivals that end a phase; what this thread did before is visible to those that wait for it.
__device__ inline void mbarrier_arrive(mbarrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Waits until the phase of that parity (0, 1, 0, .. from the first) is over; returns at once if it has yet to begin.
__device__ inline void mbarrier_wait(mbarrier* barrier, int parity) {
    unsigned over;
    do {
        asm volatile(
            "{.reg .pred over; mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2; selp.u32 %0, 1, 0, over;}"
            : "=r"(over)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory"
        );
    } while (!over);
}

// Keeps the compiler from moving accesses to the sums across this point.
template <int N>
__device__ inline void keep_in_place(float (&sum)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(sum[i])::"memory");
}

// Required before the first product, and after the sums were accessed.
template <int N>
__device__ inline void wgmma_fence(float (&sum)[N]) {
    keep_in_place(sum);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most PENDING of the groups committed last are still running; sums may be read after 0.
template <int PENDING, int N>
__device__ inline void wgmma_wait(float (&sum)[N]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
    if constexpr (PENDING == 0) keep_in_place(sum);
}

// sum [64,N] = a [64,16] b [N,16]^T of four warps, or added to it: bf16 in shared memory, float sums. Lane l of the w-th warp has rows
// 16w + l/4 and 8 below, columns 2(l%4) and the next of every 8: sum[4j + 2 below + c]. a and b: see operand_descriptor; MN_MAJOR 1: the
// span is contiguous, not K.
#define SUMS_4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define SUMS_8(i) SUMS_4(i), SUMS_4(i + 4)
#define SUMS_32(i) SUMS_8(i), SUMS_8(i + 8), SUMS_8(i + 16), SUMS_8(i + 24)
#define SUMS_64 SUMS_32(0), SUMS_32(32)
#define SUMS_128 SUMS_64, SUMS_32(64), SUMS_32(96)

template <int A_MN_MAJOR, int B_MN_MAJOR>
__device__ inline void wgmma(float (&sum)[64], unsigned long long a, unsigned long long b, bool add) {
    asm volatile(
        "{.reg .pred add; setp.ne.b32 add, %68, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, add, 1, 1, %66, %67;}"
        : SUMS_64
        : "l"(a), "l"(b), "n"(A_MN_MAJOR), "n"(B_MN_MAJOR), "r"(int(add))
    );
}

template <int A_MN_MAJOR, int B_MN_MAJOR>
__device__ inline void wgmma(float (&sum)[128], unsigned long long a, unsigned long long b, bool add) {
    asm volatile(
        "{.reg .pred add; setp.ne.b32 add, %132, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
            "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
            "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
            "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
            "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, add, 1, 1, %130, %131;}"
        : SUMS_128
        : "l"(a), "l"(b), "n"(A_MN_MAJOR), "n"(B_MN_MAJOR), "r"(int(add))
    );
}

#undef SUMS_4
#undef SUMS_8
#undef SUMS_32
#undef SUMS_64
#undef SUMS_128


// How wgmma finds an operand in shared memory under the 128-byte swizzle: 8 rows of 128 bytes, from a multiple of 1024 bytes, the next 8
// `stride` bytes on; in one that is MN-major the next 64 of the span are `leading` bytes on.
__device__ inline unsigned long long operand_descriptor(const void* shared, int leading, int stride) {
    constexpr unsigned long long SWIZZLE_128 = 1ull << 62;
    const unsigned low = unsigned(leading >> 4) << 16 | (shared_address(shared) & 0x3ffff) >> 4;
    return SWIZZLE_128 | (unsigned long long)(stride >> 4) << 32 | low;
}

// The descriptor of an operand some bytes further.
__device__ inline unsigned long long further(unsigned long long descriptor, int bytes) { return descriptor + (bytes >> 4); }
