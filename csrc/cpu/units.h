#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "lkv/cpu.h"

namespace lkv::cpu {

// How many threads are worth waking for `work` when less than `grain` each is not.
inline int64_t useful_workers(const Threads& threads, int64_t units, int64_t work, int64_t grain) {
  return std::max<int64_t>(1, std::min({threads.count, units, work / grain}));
}

// Calls f(unit, worker) for every unit in [0, units), each taken by the next free worker: units may differ in cost.
template <class F>
void for_each_unit(const Threads& threads, int64_t workers, int64_t units, F&& f) {
  if (workers <= 1) {
    for (int64_t unit = 0; unit < units; ++unit) f(unit, int64_t{0});
    return;
  }
  std::atomic<int64_t> next{0};
  threads.parallel_for(workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) f(unit, worker);
    }
  });
}

}  // namespace lkv::cpu
