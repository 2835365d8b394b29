// Runs blocks of CUDA threads on one processor thread: each CUDA thread runs until it meets a barrier or a warp operation, then the next one.
//
// Threads that wait go on when all threads of the block, or of the warp, have reached the same line; waiting for a thread that cannot get
// there is an error that names block, thread and line. Threads and blocks run in forward, reverse or shuffled order: a result that depends
// on the order shows a race. Shared memory starts as NaN (0xff bytes) in each block.
// This does not find a missing fence, or an update that should be atomic (no thread is ever interrupted).
#pragma once
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "fiber.h"

#define CUDA_ON_CPU  // tested by a source that has one text for a device and another for the processor

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ thread_local  // inside a function that implies static; all that is thread_local is shared memory
#define __constant__ static
#define __restrict__ __restrict

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    unsigned count() const { return x * y * z; }
};
static uint3 threadIdx, blockIdx;  // set whenever a fiber starts to run
static dim3 blockDim, gridDim;
constexpr int warpSize = 32;

constexpr size_t MOST_DYNAMIC = 227 * 1024;  // bytes of shared memory that a block may ask for: what sm_90 has
alignas(1024) thread_local unsigned char dynamic_shared[MOST_DYNAMIC];  // kernels: extern __shared__ unsigned char dynamic_shared[];

namespace cuda_on_cpu {

enum class State { ready, at_warp, at_group, at_block, at_condition, done };
enum Order { forward, reverse, shuffled };

using Finish = void (*)(void* const* posted);  // what a warp (or warpgroup) operation does, once, when all lanes have posted
using Condition = bool (*)(const void* what);

struct Copy {  // a cp.async that has not been waited for
    void* to;
    const void* from;  // or zeros
    int group;
};

struct Product;  // of a warpgroup (hopper.h)

struct Pending {  // a thread's part of a product that has not been waited for
    std::shared_ptr<const Product> product;
    float* sums;
    int group;
};

struct Thread {
    Fiber fiber;
    uint3 index;
    State state;
    int line;  // of what it waits at
    Finish finish;
    void* posted;
    Condition holds;  // what it waits for
    const void* what;
    bool predicate;
    std::deque<Copy> copies;
    int groups;  // committed so far
    std::vector<void*> unfenced;  // 16 bytes each that its copies wrote, and that no fence has shown to the tensor cores yet
    std::deque<Pending> products;
    int product_groups;  // committed so far
    bool sums_ready;  // since it last waited, wgmma.fence has said so
};

static std::vector<Thread> threads;
static Fiber scheduler;
static void (*kernel)(void**);
static void** arguments;
static size_t current;  // the thread that runs
static unsigned agreed;  // threads whose predicate held at the last barrier
static char failure[256];

static void wait(State state, int line) {
    Thread& self = threads[current];
    self.state = state;
    self.line = line;
    switch_to(self.fiber, scheduler);
}

// Ends the launch with an error of the kernel.
[[noreturn]] static void fail(const char* words) {
    const uint3 t = threads[current].index;
    snprintf(failure, sizeof failure, "block (%u,%u,%u), thread (%u,%u,%u): %s", blockIdx.x, blockIdx.y, blockIdx.z, t.x, t.y, t.z, words);
    switch_to(threads[current].fiber, scheduler);
    __builtin_trap();
}

static void run_thread() {
    kernel(arguments);
    wait(State::done, 0);
    __builtin_trap();
}

// Posts `mine` and waits until all lanes of the warp have posted; `finish` is then called once, for all of them.
template <class Body>
void with_warp(unsigned mask, Body& mine, void (*finish)(void* const*), int line) {
    if (mask != 0xffffffffu) fail("a warp operation without all 32 lanes");
    threads[current].posted = &mine;
    threads[current].finish = finish;
    wait(State::at_warp, line);
}

// The same for a warpgroup, four warps whose first is a multiple of four.
template <class Body>
void with_group(Body& mine, void (*finish)(void* const*), int line) {
    threads[current].posted = &mine;
    threads[current].finish = finish;
    wait(State::at_group, line);
}

// Waits until `holds(what)`, which other threads bring about.
static void wait_until(Condition holds, const void* what, int line) {
    if (holds(what)) return;
    threads[current].holds = holds;
    threads[current].what = what;
    wait(State::at_condition, line);
}

static int barrier(bool predicate, int line) {
    threads[current].predicate = predicate;
    wait(State::at_block, line);
    return int(agreed);
}

// True if these threads are all in `state`, at the same line.
static bool together(size_t first, size_t count, State state) {
    for (size_t t = first; t < first + count; t++)
        if (threads[t].state != state || threads[t].line != threads[first].line) return false;
    return true;
}

static void release(size_t first, size_t count) {
    for (size_t t = first; t < first + count; t++) threads[t].state = State::ready;
}

// Does the operation of a warp or warpgroup if all of its threads have reached it.   -> whether it was done
static bool finish_together(size_t first, size_t count, State state) {
    if (first + count > threads.size() || !together(first, count, state)) return false;
    void* posted[128];
    for (size_t lane = 0; lane < count; lane++) {
        posted[lane] = threads[first + lane].posted;
        if (threads[first + lane].finish != threads[first].finish) return false;
    }
    threads[first].finish(posted);
    release(first, count);
    return true;
}

// Runs the threads of a warp, in order, until all of them wait.   -> whether any of them ran
static bool run_warp(const std::vector<unsigned>& lanes, size_t first) {
    bool moved = false;
    do {
        for (unsigned lane : lanes) {
            Thread& thread = threads[first + lane];
            if (thread.state == State::at_condition && thread.holds(thread.what)) thread.state = State::ready;
            if (thread.state != State::ready) continue;
            current = first + lane;
            threadIdx = thread.index;
            switch_to(scheduler, thread.fiber);
            if (failure[0]) return true;
            moved = true;
        }
    } while (finish_together(first, 32, State::at_warp));
    moved |= finish_together(first / 128 * 128, 128, State::at_group);
    return moved;
}

static const char* describe(State state) {
    switch (state) {
        case State::at_warp: return "a warp operation";
        case State::at_group: return "an operation of its warpgroup";
        case State::at_block: return "__syncthreads";
        case State::at_condition: return "an mbarrier";
        default: return "the end";
    }
}

// Names the first thread that waits, and the first of its warp or warpgroup (operation) or block (barrier) that is elsewhere.
static void explain() {
    size_t t = 0, other;
    while (threads[t].state == State::done) t++;
    const size_t size = threads[t].state == State::at_warp ? 32 : threads[t].state == State::at_group ? 128 : threads.size();
    const size_t first = t / size * size, last = std::min(first + size, threads.size());
    other = first;
    while (other < last && threads[other].state == threads[t].state && threads[other].line == threads[t].line) other++;
    if (other == last) other = t;  // different operations on one line
    snprintf(
        failure, sizeof failure, "block (%u,%u,%u): thread %zu waits at %s (line %d), thread %zu is at %s (line %d)", blockIdx.x, blockIdx.y,
        blockIdx.z, t, describe(threads[t].state), threads[t].line, other, describe(threads[other].state), threads[other].line
    );
}

struct Span {
    char* begin;
    size_t size;
};

// Finds this library's shared memory: all that is thread_local in it.
static int find_shared(dl_phdr_info* info, size_t, void* found) {
    bool ours = false;
    const auto here = reinterpret_cast<uintptr_t>(&find_shared);
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto& segment = info->dlpi_phdr[i];
        const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
        ours |= segment.p_type == PT_LOAD && here >= begin && here < begin + segment.p_memsz;
    }
    for (int i = 0; ours && i < info->dlpi_phnum; i++)
        if (info->dlpi_phdr[i].p_type == PT_TLS)
            *static_cast<Span*>(found) = {static_cast<char*>(info->dlpi_tls_data), info->dlpi_phdr[i].p_memsz};
    return ours;
}

// Fills it with NaN, except dynamic memory beyond what the launch asked for.
static void poison(Span shared, size_t dynamic_bytes) {
    char* dynamic = reinterpret_cast<char*>(dynamic_shared);
    memset(shared.begin, 0xff, dynamic - shared.begin);
    memset(dynamic, 0xff, dynamic_bytes);
    char* after = dynamic + MOST_DYNAMIC;
    memset(after, 0xff, shared.begin + shared.size - after);
}

static void run_block(const Stacks& stacks, const std::vector<unsigned>& warps, const std::vector<unsigned>& lanes) {
    for (size_t t = 0; t < threads.size(); t++) {
        prepare(threads[t].fiber, stacks[t], run_thread);
        threads[t].state = State::ready;
        threads[t].copies.clear();
        threads[t].unfenced.clear();
        threads[t].products.clear();
        threads[t].groups = threads[t].product_groups = 0;
        threads[t].sums_ready = false;
    }
    while (!together(0, threads.size(), State::done)) {
        bool moved = false;
        for (unsigned warp : warps) {
            moved |= run_warp(lanes, warp * 32);
            if (failure[0]) return;
        }
        if (together(0, threads.size(), State::at_block)) {
            agreed = unsigned(std::count_if(threads.begin(), threads.end(), [](const Thread& thread) { return thread.predicate; }));
            release(0, threads.size());
        } else if (!moved) {
            explain();
            return;
        }
    }
    for (size_t t = 0; t < threads.size(); t++)
        if (!threads[t].copies.empty()) {
            snprintf(
                failure, sizeof failure, "block (%u,%u,%u): thread %zu ends with a cp.async under way: it was not committed, or not waited for",
                blockIdx.x, blockIdx.y, blockIdx.z, t
            );
            return;
        }
}

static std::vector<unsigned> arrange(unsigned count, int order) {
    std::vector<unsigned> indices(count);
    std::iota(indices.begin(), indices.end(), 0u);
    if (order == reverse) std::reverse(indices.begin(), indices.end());
    if (order == shuffled) std::shuffle(indices.begin(), indices.end(), std::mt19937(count));
    return indices;
}

// Launches a kernel.   -> 0, or 1 with `message` filled. `others`: shared memory outside of this library.
static int launch(
    void (*call)(void**), const unsigned* grid, const unsigned* block, size_t dynamic_bytes, void** args, int order, char* message,
    size_t size, const std::vector<Span>& others = {}
) {
    gridDim = dim3(grid[0], grid[1], grid[2]);
    blockDim = dim3(block[0], block[1], block[2]);
    const unsigned count = blockDim.count();
    failure[0] = 0;
    if (count == 0 || count > 1024 || count % 32 || dynamic_bytes > MOST_DYNAMIC) {
        snprintf(message, size, "%u threads a block (want whole warps, at most 1024), %zu bytes of shared memory", count, dynamic_bytes);
        return 1;
    }
    kernel = call;
    arguments = args;
    threads.assign(count, Thread());
    for (unsigned t = 0; t < count; t++)
        threads[t].index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
    const Stacks stacks(count);
    dynamic_shared[0] = 0;  // the first use makes this library's thread_local memory
    Span shared = {nullptr, 0};
    dl_iterate_phdr(find_shared, &shared);
    const auto warps = arrange(count / 32, order), lanes = arrange(32, order);
    for (unsigned b : arrange(gridDim.count(), order)) {
        blockIdx = {b % gridDim.x, b / gridDim.x % gridDim.y, b / gridDim.x / gridDim.y};
        poison(shared, dynamic_bytes);
        for (const Span& other : others) memset(other.begin, 0xff, other.size);
        run_block(stacks, warps, lanes);
        if (failure[0]) {
            snprintf(message, size, "%s", failure);
            return 1;
        }
    }
    return 0;
}

// Calls f with the values that args point to.
template <class... T, size_t... I>
void call_with(void (*f)(T...), void** args, std::index_sequence<I...>) {
    f(*static_cast<std::remove_reference_t<T>*>(args[I])...);
}

template <class... T>
void call_with(void (*f)(T...), void** args) {
    call_with(f, args, std::index_sequence_for<T...>{});
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_EXPORT(name, ...)                                                                                                        \
    extern "C" __attribute__((visibility("default"))) int launch_##name(                                                                  \
        const unsigned* grid, const unsigned* block, size_t dynamic_bytes, void** args, int order, char* message, size_t size             \
    ) {                                                                                                                                   \
        return cuda_on_cpu::launch(                                                                                                       \
            [](void** a) { cuda_on_cpu::call_with(&__VA_ARGS__, a); }, grid, block, dynamic_bytes, args, order, message, size                    \
        );                                                                                                                                \
    }
