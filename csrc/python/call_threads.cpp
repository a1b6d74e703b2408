#include "call_threads.h"

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

namespace lkv::python {

CallThreads::CallThreads(int64_t most, int64_t bytes) {
  constexpr int64_t kBytesPerThread = 1 << 20;
  count_ = std::clamp<int64_t>(bytes / kBytesPerThread, 1, most);
}

void CallThreads::run(void* self, int64_t n, int64_t grain, cpu::Threads::Body body, void* context) {
  const int64_t count = static_cast<CallThreads*>(self)->count_;
  const int64_t step = std::max(grain, (n + count - 1) / count);
  std::vector<std::jthread> helpers;
  helpers.reserve(count);
  int64_t begin = step;
  try {
    for (; begin < n; begin += step) helpers.emplace_back(body, context, begin, std::min(begin + step, n));
  } catch (const std::system_error&) {
    // No more threads to be had: the caller's own takes the ranges that are left.
  }
  body(context, 0, std::min(step, n));
  for (; begin < n; begin += step) body(context, begin, std::min(begin + step, n));
}

}  // namespace lkv::python
