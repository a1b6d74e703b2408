#pragma once

#include <cstdint>

#include "lkv/cpu.h"

namespace lkv::python {

// The threads of one call. They start when a kernel needs them and end when it returns, so that none of them
// survives a fork; starting one costs what moving some hundred kilobytes does, so small work stays on the caller's.
class CallThreads {
 public:
  // At most `most` threads for a kernel that touches `bytes` of memory.
  CallThreads(int64_t most, int64_t bytes);

  operator cpu::Threads() { return {run, this, count_}; }

 private:
  static void run(void* self, int64_t n, int64_t grain, cpu::Threads::Body body, void* context);

  int64_t count_;
};

}  // namespace lkv::python
