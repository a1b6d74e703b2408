#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(LKV_EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace {

constexpr size_t stack_bytes = 64 << 10;

Fiber* starting = nullptr;  // handed to begin(), which takes no argument

}  // namespace

Stack StackPool::take() {
  if (!free_.empty()) {
    const Stack stack = free_.back();
    free_.pop_back();
    return stack;
  }
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, stack_bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) throw std::bad_alloc();
  return {static_cast<char*>(memory) + page, stack_bytes};
}

#if LKV_EMULATOR_ASSEMBLY

// Saves what the System V ABI asks a callee to save, then continues on the other stack.
extern "C" void lkv_emulator_switch(void** save, void* load);
asm(R"(
  .text
  .globl lkv_emulator_switch
  .hidden lkv_emulator_switch
  .type lkv_emulator_switch, @function
lkv_emulator_switch:
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
  .size lkv_emulator_switch, . - lkv_emulator_switch
)");

#endif

void Fiber::prepare(Stack stack, Entry entry, void* argument) {
  stack_ = stack;
  entry_ = entry;
  argument_ = argument;
  shadow_ = nullptr;
#if LKV_EMULATOR_ASSEMBLY
  const uintptr_t top = (reinterpret_cast<uintptr_t>(stack.base) + stack.bytes) & ~uintptr_t{15};
  auto** frame = reinterpret_cast<void**>(top) - 8;  // six registers, the return address, and one word of alignment
  for (int i = 0; i < 8; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(&Fiber::begin);
  place_ = frame;
#else
  getcontext(&place_);
  place_.uc_stack.ss_sp = stack.base;
  place_.uc_stack.ss_size = stack.bytes;
  place_.uc_link = nullptr;
  makecontext(&place_, &Fiber::begin, 0);
#endif
}

void Fiber::begin() {
  Fiber* self = starting;
  self->arrive();
  self->entry_(self->argument_);
  std::abort();
}

void Fiber::arrive() {
#if defined(LKV_EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(shadow_, &home_stack_, &home_bytes_);
#endif
}

void Fiber::resume() {
  starting = this;
#if defined(LKV_EMULATOR_ASAN)
  void* home_shadow = nullptr;
  __sanitizer_start_switch_fiber(&home_shadow, stack_.base, stack_.bytes);
#endif
#if LKV_EMULATOR_ASSEMBLY
  lkv_emulator_switch(&home_, place_);
#else
  swapcontext(&home_, &place_);
#endif
#if defined(LKV_EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(home_shadow, nullptr, nullptr);
#endif
}

void Fiber::leave(bool for_good) {
#if defined(LKV_EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &shadow_, home_stack_, home_bytes_);
#endif
#if LKV_EMULATOR_ASSEMBLY
  lkv_emulator_switch(&place_, home_);
#else
  swapcontext(&place_, &home_);
#endif
  arrive();
}

void Fiber::finish() {
  leave(true);
  std::abort();
}

}  // namespace emulator
