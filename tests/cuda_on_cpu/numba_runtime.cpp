// What numba-cuda's LLVM code calls on a device, for a processor: special registers, barriers, warp operations, atomics, libdevice.
// LLVM calls these functions by names that C++ does not allow; `__asm__` gives them those. A barrier is identified by its return address.
#include "tensor_core.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))
#define NAMED(result, function, name, parameters)      \
    EXPORTED result function parameters __asm__(name); \
    result function parameters

static int place(void* address) { return int(reinterpret_cast<intptr_t>(address) & 0x7fffffff); }
#define HERE place(__builtin_return_address(0))

EXPORTED int launch_compiled(
    void (*call)(void**), const unsigned* grid, const unsigned* block, size_t dynamic_bytes, void** args, int order, char* message,
    size_t size, char* const* shared, const size_t* shared_bytes, int count
) {
    std::vector<cuda_on_cpu::Span> others;
    for (int i = 0; i < count; i++) others.push_back({shared[i], shared_bytes[i]});
    return cuda_on_cpu::launch(call, grid, block, dynamic_bytes, args, order, message, size, others);
}
EXPORTED void* address_of_dynamic_shared() { return dynamic_shared; }

// ---- special registers --------------------------------------------------------------------------------------------------------------

#define REGISTER(function, name, value) \
    NAMED(unsigned, function, "nvvm.read.ptx.sreg." name, ()) { return value; }
REGISTER(tid_x, "tid.x", threadIdx.x)
REGISTER(tid_y, "tid.y", threadIdx.y)
REGISTER(tid_z, "tid.z", threadIdx.z)
REGISTER(ctaid_x, "ctaid.x", blockIdx.x)
REGISTER(ctaid_y, "ctaid.y", blockIdx.y)
REGISTER(ctaid_z, "ctaid.z", blockIdx.z)
REGISTER(ntid_x, "ntid.x", blockDim.x)
REGISTER(ntid_y, "ntid.y", blockDim.y)
REGISTER(ntid_z, "ntid.z", blockDim.z)
REGISTER(nctaid_x, "nctaid.x", gridDim.x)
REGISTER(nctaid_y, "nctaid.y", gridDim.y)
REGISTER(nctaid_z, "nctaid.z", gridDim.z)
REGISTER(laneid, "laneid", unsigned(cuda_on_cpu::lane()))
REGISTER(warpsize, "warpsize", 32)

// ---- barriers and warp operations -----------------------------------------------------------------------------------------------------

NAMED(void, barrier0, "nvvm.barrier0", ()) { cuda_on_cpu::barrier(false, HERE); }
NAMED(int, barrier0_count, "nvvm.barrier0.popc", (int predicate)) { return cuda_on_cpu::barrier(predicate != 0, HERE); }
NAMED(int, barrier0_and, "nvvm.barrier0.and", (int predicate)) { return cuda_on_cpu::barrier(predicate != 0, HERE) == int(blockDim.count()); }
NAMED(int, barrier0_or, "nvvm.barrier0.or", (int predicate)) { return cuda_on_cpu::barrier(predicate != 0, HERE) != 0; }
NAMED(void, warp_barrier, "nvvm.bar.warp.sync", (unsigned mask)) { __syncwarp(mask, HERE); }
NAMED(void, fence_device, "nvvm.membar.gl", ()) {}
NAMED(void, fence_block, "nvvm.membar.cta", ()) {}
NAMED(void, fence_system, "nvvm.membar.sys", ()) {}

// PTX's shfl.sync: mode 0 idx, 1 up, 2 down, 3 bfly; bits 8 .. 12 of `clamp` cut the warp into parts. `inside`: was the source in its part?
EXPORTED unsigned warp_shuffle(unsigned mask, int mode, unsigned value, unsigned offset, unsigned clamp, unsigned char* inside) {
    const int lane = cuda_on_cpu::lane(), part = clamp >> 8 & 31, last = (lane & part) | (int(clamp & 31) & ~part), by = int(offset & 31);
    int source = mode == 0 ? (lane & part) | (by & ~part) : mode == 1 ? lane - by : mode == 2 ? lane + by : lane ^ by;
    *inside = mode == 1 ? source >= last : source <= last;
    if (!*inside) source = lane;
    return cuda_on_cpu::shuffle(mask, value, source, HERE);
}
// PTX's vote.sync: mode 0 all, 1 any, 2 uniform, 3 ballot.
EXPORTED unsigned warp_vote(unsigned mask, int mode, int predicate) {
    const unsigned votes = __ballot_sync(mask, predicate, HERE);
    return mode == 0 ? votes == mask : mode == 1 ? votes != 0 : mode == 2 ? votes == mask || votes == 0 : votes;
}
NAMED(unsigned, match_any, "nvvm.match.any.sync.i32", (unsigned mask, unsigned value)) { return __match_any_sync(mask, value, HERE); }

// ---- atomics on floats: numba-cuda emits the others as LLVM's own instructions ---------------------------------------------------------

NAMED(float, add_float, "nvvm.atomic.load.add.f32.p0f32", (float* address, float value)) { return atomicAdd(address, value); }
NAMED(double, add_double, "nvvm.atomic.load.add.f64.p0f64", (double* address, double value)) { return atomicAdd(address, value); }
EXPORTED float ___numba_atomic_float_max(float* address, float value) { return atomicMax(address, value); }
EXPORTED float ___numba_atomic_float_min(float* address, float value) { return atomicMin(address, value); }

// ---- libdevice ------------------------------------------------------------------------------------------------------------------------

#define BOTH(name)                                             \
    EXPORTED float __nv_##name##f(float x) { return name##f(x); } \
    EXPORTED double __nv_##name(double x) { return name(x); }
BOTH(exp)
BOTH(exp2)
BOTH(log)
BOTH(log2)
BOTH(log1p)
BOTH(expm1)
BOTH(sqrt)
BOTH(tanh)
BOTH(erf)
BOTH(sin)
BOTH(cos)
BOTH(floor)
BOTH(ceil)
BOTH(trunc)
EXPORTED float __nv_fabsf(float x) { return fabsf(x); }
EXPORTED double __nv_fabs(double x) { return fabs(x); }
EXPORTED float __nv_rsqrtf(float x) { return rsqrtf(x); }
EXPORTED float __nv_fast_expf(float x) { return expf(x); }
EXPORTED float __nv_fast_logf(float x) { return logf(x); }
EXPORTED float __nv_fmaxf(float a, float b) { return fmaxf(a, b); }
EXPORTED float __nv_fminf(float a, float b) { return fminf(a, b); }
EXPORTED double __nv_fmax(double a, double b) { return fmax(a, b); }
EXPORTED double __nv_fmin(double a, double b) { return fmin(a, b); }
EXPORTED float __nv_powf(float a, float b) { return powf(a, b); }
EXPORTED double __nv_pow(double a, double b) { return pow(a, b); }
EXPORTED int __nv_ffs(int x) { return __builtin_ffs(x); }
EXPORTED float __nv_int_as_float(int value) { return __int_as_float(value); }
EXPORTED int __nv_float_as_int(float value) { return __float_as_int(value); }
