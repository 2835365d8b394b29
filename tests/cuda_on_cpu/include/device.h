// What CUDA C has beyond C++, for kernels on a processor: vector types, warp operations, barriers, atomics, intrinsics.
#pragma once
#include <cfloat>
#include <climits>
#include <cmath>
#include <type_traits>

#include "block.h"

// ---- vectors of 8 and 16 bytes ------------------------------------------------------------------------------------------------------

#define CUDA_ON_CPU_VECTORS(type, name)                                              \
    struct alignas(2 * sizeof(type)) name##2 {                                       \
        type x, y;                                                                   \
    };                                                                               \
    struct alignas(4 * sizeof(type)) name##4 {                                       \
        type x, y, z, w;                                                             \
    };                                                                               \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                 \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

CUDA_ON_CPU_VECTORS(float, float)
CUDA_ON_CPU_VECTORS(int, int)
CUDA_ON_CPU_VECTORS(unsigned, uint)

// ---- warp operations: all 32 lanes, always ------------------------------------------------------------------------------------------

namespace cuda_on_cpu {

template <class To, class From>
To bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "the bits of a number of the same size");
    To result;
    memcpy(&result, &value, sizeof result);
    return result;
}

inline int lane() {
    const uint3 t = threadIdx;
    return int((t.x + blockDim.x * (t.y + blockDim.y * t.z)) % 32);
}

template <class T>
struct Exchange {
    T value;
    int source;
    T received;
};

template <class T>
void exchange(void* const* posted) {
    for (int lane = 0; lane < 32; lane++) {
        auto* mine = static_cast<Exchange<T>*>(posted[lane]);
        mine->received = static_cast<Exchange<T>*>(posted[mine->source])->value;
    }
}

template <class T>
T shuffle(unsigned mask, T value, int source, int line) {
    Exchange<T> mine = {value, source, value};
    with_warp(mask, mine, exchange<T>, line);
    return mine.received;
}

struct Vote {
    unsigned value, result;
};

inline void ballot(void* const* posted) {
    unsigned result = 0;
    for (int lane = 0; lane < 32; lane++) result |= unsigned(static_cast<Vote*>(posted[lane])->value != 0) << lane;
    for (int lane = 0; lane < 32; lane++) static_cast<Vote*>(posted[lane])->result = result;
}

inline void match(void* const* posted) {
    for (int lane = 0; lane < 32; lane++) {
        auto* mine = static_cast<Vote*>(posted[lane]);
        mine->result = 0;
        for (int other = 0; other < 32; other++)
            mine->result |= unsigned(static_cast<Vote*>(posted[other])->value == mine->value) << other;
    }
}

inline unsigned vote(unsigned mask, unsigned value, void (*finish)(void* const*), int line) {
    Vote mine = {value, 0};
    with_warp(mask, mine, finish, line);
    return mine.result;
}

// The lane to read from where a shuffle by `width` would leave its part of the warp: its own.
inline int within(int source, int width) { return source / width == lane() / width && source >= 0 ? source : lane(); }

}  // namespace cuda_on_cpu

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
    return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::lane() / width * width + source % width, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, int line = __builtin_LINE()) {
    return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::within(cuda_on_cpu::lane() ^ lane_mask, width), line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
    return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::within(cuda_on_cpu::lane() - int(delta), width), line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
    return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::within(cuda_on_cpu::lane() + int(delta), width), line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return cuda_on_cpu::vote(mask, predicate != 0, cuda_on_cpu::ballot, line);
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) { return __ballot_sync(mask, predicate, line) != 0; }
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) { return __ballot_sync(mask, predicate, line) == mask; }
inline unsigned __match_any_sync(unsigned mask, unsigned value, int line = __builtin_LINE()) {
    return cuda_on_cpu::vote(mask, value, cuda_on_cpu::match, line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) { cuda_on_cpu::vote(mask, 0, cuda_on_cpu::ballot, line); }

// ---- barriers -----------------------------------------------------------------------------------------------------------------------

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::barrier(false, line); }
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) { return cuda_on_cpu::barrier(predicate != 0, line); }
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) { return cuda_on_cpu::barrier(predicate != 0, line) != 0; }
inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
    return cuda_on_cpu::barrier(predicate != 0, line) == int(blockDim.count());
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- atomics: nobody is interrupted, so a plain update is one --------------------------------------------------------------------------

namespace cuda_on_cpu {
template <class T>
T replace(T* address, T value) {
    const T old = *address;
    *address = value;
    return old;
}
}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_ATOMIC(name, result)                  \
    template <class T>                                    \
    T name(T* address, T value) {                         \
        const T old = *address;                           \
        return cuda_on_cpu::replace(address, T(result));  \
    }

CUDA_ON_CPU_ATOMIC(atomicAdd, old + value)
CUDA_ON_CPU_ATOMIC(atomicMax, value > old ? value : old)
CUDA_ON_CPU_ATOMIC(atomicMin, value < old ? value : old)
CUDA_ON_CPU_ATOMIC(atomicOr, old | value)
CUDA_ON_CPU_ATOMIC(atomicExch, ((void)old, value))
template <class T>
T atomicCAS(T* address, T expected, T value) {
    return cuda_on_cpu::replace(address, *address == expected ? value : *address);
}

// ---- intrinsics ---------------------------------------------------------------------------------------------------------------------

using std::max;
using std::min;
template <class T>
T __ldg(const T* address) {
    return *address;
}
inline float __int_as_float(int value) { return cuda_on_cpu::bits<float>(value); }
inline int __float_as_int(float value) { return cuda_on_cpu::bits<int>(value); }
inline float __uint_as_float(unsigned value) { return cuda_on_cpu::bits<float>(value); }
inline unsigned __float_as_uint(float value) { return cuda_on_cpu::bits<unsigned>(value); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value ? __builtin_clz(unsigned(value)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
