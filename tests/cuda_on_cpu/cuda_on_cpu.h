// CUDA C on a processor: a kernel compiled with this header before it runs under g++, each CUDA thread a fiber (ucontext), one at a time.
//
// A fiber runs until it meets a warp shuffle or __syncthreads, then the next has its turn; the scheduler lets the waiting ones go on when
// all of the warp, or of the block, have come. The order of threads and blocks is forward, reverse or shuffled: what depends on it is a
// race. Shared memory starts as NaN (0xff bytes). Waiting for a thread that cannot come is an error that names the block and thread.
// Covered: one-dimensional launches, static __shared__, __syncthreads, __shfl_xor_sync over whole warps, atomicAdd, __threadfence.
// Not seen here: a missing fence, an unatomic update (no fiber is ever interrupted), alignment.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static __attribute__((section("cuda_shared")))  // the linker then knows where all shared memory begins and ends

struct Index {
    unsigned x;
};
static Index threadIdx, blockIdx, blockDim, gridDim;  // set whenever a fiber gets its turn

extern "C" char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

namespace cuda_on_cpu {

enum class State { ready, at_warp, at_block, done };
enum Order { forward, reverse, shuffled };
constexpr size_t STACK_BYTES = 64 * 1024;

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state;
    int line;                  // of the shuffle or barrier that it waits at
    uint32_t posted, received;  // what it gives to, and gets from, a shuffle
    unsigned lane_mask;        // its partner in the shuffle is lane ^ lane_mask
};

static std::vector<Thread> threads;
static ucontext_t scheduler;
static void (*kernel)(void**);
static void** arguments;

static void wait(State state, int line) {
    Thread& self = threads[threadIdx.x];
    self.state = state;
    self.line = line;
    swapcontext(&self.context, &scheduler);
}

template <class T>
T shuffle_xor(T value, unsigned lane_mask, int line) {
    static_assert(sizeof(T) == 4, "shuffles move four bytes");
    Thread& self = threads[threadIdx.x];
    memcpy(&self.posted, &value, 4);
    self.lane_mask = lane_mask;
    wait(State::at_warp, line);
    memcpy(&value, &self.received, 4);
    return value;
}

static void run_thread() {
    kernel(arguments);
    threads[threadIdx.x].state = State::done;
    threads[threadIdx.x].line = 0;
}  // the context's uc_link leads back to the scheduler

static void start(Thread& thread) {
    if (!thread.stack) thread.stack.reset(new char[STACK_BYTES]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = STACK_BYTES;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, run_thread, 0);
    thread.state = State::ready;
}

// Are these threads all in `state`, at the same line?
static bool together(size_t first, size_t count, State state) {
    return std::all_of(threads.begin() + first, threads.begin() + first + count, [=](const Thread& thread) {
        return thread.state == state && thread.line == threads[first].line;
    });
}

static void release(size_t first, size_t count) {
    for (size_t t = first; t < first + count; t++) threads[t].state = State::ready;
}

static void finish_shuffle(size_t first) {
    for (size_t lane = 0; lane < 32; lane++) {
        Thread& thread = threads[first + lane];
        thread.received = threads[first + (lane ^ thread.lane_mask)].posted;
    }
    release(first, 32);
}

// One turn for each ready thread, then whatever wait is over.   -> did anything move
static bool one_round(const std::vector<unsigned>& order) {
    bool moved = false;
    for (unsigned t : order) {
        if (threads[t].state != State::ready) continue;
        threadIdx.x = t;
        swapcontext(&scheduler, &threads[t].context);
        moved = true;
    }
    for (size_t first = 0; first < threads.size(); first += 32)
        if (together(first, 32, State::at_warp)) finish_shuffle(first);
    if (together(0, threads.size(), State::at_block)) release(0, threads.size());
    return moved;
}

static const char* describe(State state) {
    return state == State::at_warp ? "a warp shuffle" : state == State::at_block ? "__syncthreads" : "the end";
}

// The first thread that waits, and the first of its warp (shuffle) or block (barrier) that is elsewhere.
static void explain(char* message, size_t size) {
    size_t t = 0, other;
    while (threads[t].state == State::done) t++;
    const bool in_warp = threads[t].state == State::at_warp;
    other = in_warp ? t / 32 * 32 : 0;
    while (threads[other].state == threads[t].state && threads[other].line == threads[t].line) other++;
    snprintf(
        message, size, "block %u: thread %zu waits at %s (line %d), thread %zu is at %s (line %d)", blockIdx.x,
        t, describe(threads[t].state), threads[t].line, other, describe(threads[other].state), threads[other].line
    );
}

static bool run_block(const std::vector<unsigned>& order, char* message, size_t size) {
    std::fill(__start_cuda_shared, __stop_cuda_shared, char(0xff));
    for (Thread& thread : threads) start(thread);
    while (!together(0, threads.size(), State::done)) {
        if (!one_round(order)) {
            explain(message, size);
            return false;
        }
    }
    return true;
}

static std::vector<unsigned> arrange(unsigned count, Order order) {
    std::vector<unsigned> indices(count);
    std::iota(indices.begin(), indices.end(), 0u);
    if (order == reverse) std::reverse(indices.begin(), indices.end());
    if (order == shuffled) std::shuffle(indices.begin(), indices.end(), std::mt19937(count));
    return indices;
}

static int launch(void (*call)(void**), unsigned grid, unsigned block, void** args, int order, char* message, size_t size) {
    if (grid == 0 || block == 0 || block > 1024 || block % 32) {
        snprintf(message, size, "%u blocks of %u threads: want 1 block or more, of 32 to 1024 threads in whole warps", grid, block);
        return 1;
    }
    kernel = call;
    arguments = args;
    gridDim.x = grid;
    blockDim.x = block;
    threads.resize(block);
    const auto thread_order = arrange(block, Order(order));
    for (unsigned b : arrange(grid, Order(order))) {
        blockIdx.x = b;
        if (!run_block(thread_order, message, size)) return 1;
    }
    return 0;
}

// Calls f with the values that args point to.
template <class... T, size_t... I>
void call_with(void (*f)(T...), void** args, std::index_sequence<I...>) {
    f(*static_cast<T*>(args[I])...);
}

template <class... T>
void call_with(void (*f)(T...), void** args) {
    call_with(f, args, std::index_sequence_for<T...>{});
}

}  // namespace cuda_on_cpu

#define __syncthreads() cuda_on_cpu::wait(cuda_on_cpu::State::at_block, __LINE__)
#define __shfl_xor_sync(mask, value, lane_mask) cuda_on_cpu::shuffle_xor(value, lane_mask, __LINE__)
#define __threadfence()

template <class T>
T atomicAdd(T* address, T value) {
    T old = *address;
    *address += value;
    return old;
}

#define CUDA_ON_CPU_EXPORT(name)                                                                                                      \
    extern "C" int launch_##name(unsigned grid, unsigned block, void** args, int order, char* message, size_t size) {                 \
        return cuda_on_cpu::launch([](void** a) { cuda_on_cpu::call_with(&name, a); }, grid, block, args, order, message, size); \
    }
