#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "lkv/cpu.h"

namespace lkv::cpu {

// How many threads are worth waking for `work` when less than `grain` each is not.
inline int64_t useful_workers(const Threads& threads, int64_t units, int64_t work, int64_t grain) {
  return std::max<int64_t>(1, std::min({threads.count, units, work / grain}));
}

// Calls f(worker) for every worker in [0, workers), as many at a time as there are threads.
template <class F>
void for_each_worker(const Threads& threads, int64_t workers, F&& f) {
  threads.parallel_for(workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) f(worker);
  });
}

// Units of work in as many stretches as there are workers. Each takes those of its own first, and then helps the
// others, as units differ in cost: what a thread has touched stays in its caches, and two that met in one fresh huge
// page would both clear it.
class UnitQueue {
 public:
  UnitQueue(int64_t units, int64_t workers)
      : units_(units), stretch_((units + workers - 1) / workers), taken_(static_cast<size_t>(workers)) {}

  // Calls f(unit) until none is left in [0, units).
  template <class F>
  void drain(int64_t worker, F&& f) {
    const auto workers = static_cast<int64_t>(taken_.size());
    for (int64_t i = 0; i < workers; ++i) {
      const int64_t stretch = (worker + i) % workers, begin = stretch * stretch_;
      const int64_t end = std::min(begin + stretch_, units_);
      for (int64_t unit; (unit = begin + taken_[stretch].fetch_add(1, std::memory_order_relaxed)) < end;) f(unit);
    }
  }

 private:
  int64_t units_, stretch_;
  std::vector<std::atomic<int64_t>> taken_;
};

// Calls f(unit, worker) for every unit in [0, units).
template <class F>
void for_each_unit(const Threads& threads, int64_t workers, int64_t units, F&& f) {
  UnitQueue queue(units, workers);
  for_each_worker(threads, workers,
                  [&](int64_t worker) { queue.drain(worker, [&](int64_t unit) { f(unit, worker); }); });
}

}  // namespace lkv::cpu
