// A stack for each CUDA thread, and the switch from one to another: it saves six registers on x86-64, and uses ucontext elsewhere.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
#define CUDA_ON_CPU_OWN_SWITCH
#else
#include <ucontext.h>
#endif

namespace cuda_on_cpu {

constexpr size_t STACK_BYTES = 128 * 1024;  // memory is used only where it is touched

struct Fiber {
    void* stack_pointer = nullptr;
#if !defined(CUDA_ON_CPU_OWN_SWITCH)
    ucontext_t context;
#endif
};

// The stacks of a block's threads, in one piece.
class Stacks {
  public:
    explicit Stacks(size_t count) : bytes_(count * STACK_BYTES) {
        void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        base_ = static_cast<char*>(memory);
    }
    ~Stacks() { munmap(base_, bytes_); }
    Stacks(const Stacks&) = delete;
    Stacks& operator=(const Stacks&) = delete;
    char* operator[](size_t i) const { return base_ + i * STACK_BYTES; }

  private:
    size_t bytes_;
    char* base_;
};

#if defined(CUDA_ON_CPU_OWN_SWITCH)

// Saves the registers that a function must preserve on the old stack, and continues where the new one was left.
extern "C" void cuda_on_cpu_switch(void** save, void* to) __asm__("cuda_on_cpu_switch_here");
__asm__(R"(
.text
.local cuda_on_cpu_switch_here
.type cuda_on_cpu_switch_here,@function
cuda_on_cpu_switch_here:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

inline void prepare(Fiber& fiber, char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + STACK_BYTES - 64);
    *--top = nullptr;  // the return address of entry, which never returns; the stack is then aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber.stack_pointer = top;
}

inline void switch_to(Fiber& from, Fiber& to) { cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer); }

#else

inline void prepare(Fiber& fiber, char* stack, void (*entry)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
}

inline void switch_to(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

}  // namespace cuda_on_cpu
