// A fiber: a function on a stack of its own that gives control back when it has to wait.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// The emulator's own bookkeeping is no memory access of the kernel under test.
#define NEFKERN_UNCHECKED __attribute__((no_sanitize("thread")))

namespace nefkern::emulator {

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer in *saved, and continues at `next`.
extern "C" void nefkern_switch_stack(void** saved, void* next);
asm(R"(
.section .text.nefkern_switch_stack,"axG",@progbits,nefkern_switch_stack,comdat
.weak nefkern_switch_stack
.type nefkern_switch_stack,@function
nefkern_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size nefkern_switch_stack, .-nefkern_switch_stack
.text
)");
#endif

// Only one fiber runs at a time, and only the scheduler (whoever called resume) starts one.
class Fiber {
 public:
  Fiber() {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<char*>(memory);
  }
  ~Fiber() { munmap(stack_, kStackBytes); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Lets the next resume() begin `entry`, which must never return: it ends by finish().
  NEFKERN_UNCHECKED void prepare(void (*entry)()) {
    entry_ = entry;
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(stack_ + kStackBytes);
    *--top = nullptr;  // where a caller would be: the stack is aligned as after a call
    *--top = reinterpret_cast<void*>(&Fiber::begin);
    for (int reg = 0; reg < 6; ++reg) *--top = nullptr;
    self_ = top;
#else
    getcontext(&self_);
    self_.uc_stack.ss_sp = stack_;
    self_.uc_stack.ss_size = kStackBytes;
    self_.uc_link = nullptr;
    makecontext(&self_, &Fiber::begin, 0);
#endif
  }

  // Runs the fiber until it suspends itself.
  NEFKERN_UNCHECKED void resume() {
    running() = this;
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, stack_, kStackBytes);
#endif
#if defined(__x86_64__)
    nefkern_switch_stack(&scheduler_, self_);
#else
    swapcontext(&scheduler_, &self_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  // Back to the scheduler; returns when it resumes this fiber.
  static void suspend() { running()->leave(false); }

  // Back to the scheduler for good.
  [[noreturn]] static void finish() {
    for (;;) running()->leave(true);
  }

 private:
  static constexpr size_t kStackBytes = 256 << 10;

  static Fiber*& running() {
    static Fiber* fiber = nullptr;
    return fiber;
  }

  NEFKERN_UNCHECKED void leave([[maybe_unused]] bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, scheduler_stack_,
                                   scheduler_stack_bytes_);
#endif
#if defined(__x86_64__)
    nefkern_switch_stack(&self_, scheduler_);
#else
    swapcontext(&self_, &scheduler_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  NEFKERN_UNCHECKED static void begin() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &running()->scheduler_stack_,
                                    &running()->scheduler_stack_bytes_);
#endif
    running()->entry_();
    finish();
  }

  char* stack_;
  void (*entry_)() = nullptr;
#if defined(__x86_64__)
  void* self_ = nullptr;
  void* scheduler_ = nullptr;
#else
  ucontext_t self_, scheduler_;
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
#endif
};

}  // namespace nefkern::emulator
