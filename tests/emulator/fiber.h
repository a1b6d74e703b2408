#pragma once

#include <cstddef>
#include <vector>

#if !defined(__x86_64__) || defined(LKV_EMULATOR_UCONTEXT)
#define LKV_EMULATOR_ASSEMBLY 0
#include <ucontext.h>
#else
#define LKV_EMULATOR_ASSEMBLY 1
#endif

// A fiber is a stack and the place where its code stands. The scheduler resumes it; it suspends itself.

namespace emulator {

struct Stack {
  char* base;  // lowest usable byte; the page below it is a guard
  size_t bytes;
};

// Stacks are used again by later blocks: mapping one costs far more than running a short kernel thread.
class StackPool {
 public:
  Stack take();
  void put(Stack stack) { free_.push_back(stack); }

 private:
  std::vector<Stack> free_;
};

class Fiber {
 public:
  using Entry = void (*)(void*);

  // `entry` must end with a call of finish() and never return.
  void prepare(Stack stack, Entry entry, void* argument);
  void resume();
  void suspend() { leave(false); }
  [[noreturn]] void finish();

  const Stack& stack() const { return stack_; }

 private:
  static void begin();
  void arrive();
  void leave(bool for_good);

  Stack stack_{};
  Entry entry_ = nullptr;
  void* argument_ = nullptr;
#if LKV_EMULATOR_ASSEMBLY
  void* place_ = nullptr;
  void* home_ = nullptr;
#else
  ucontext_t place_, home_;
#endif
  // What AddressSanitizer must know at every switch.
  void* shadow_ = nullptr;
  const void* home_stack_ = nullptr;
  size_t home_bytes_ = 0;
};

}  // namespace emulator
