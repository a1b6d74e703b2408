#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "lkv/cpu.h"
#include "row_kernels.h"

// How the work of an op is cut into units for threads, and the units of select and gather, which evict runs together.

namespace lkv::cpu {

// How many threads are worth waking for `work`, where each should have at least `grain` of it.
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

// How many threads a select is worth.
int64_t select_workers(const SelectParams& p, const Threads& threads);

// A select cut into units of work: a segment each, or one unit that writes the slack where there is none.
class SelectUnits {
 public:
  SelectUnits(const SelectParams& p, int64_t workers);

  int64_t count() const { return std::max<int64_t>(p_.source.rows(), 1); }
  void run(int64_t unit, int64_t worker) const;

 private:
  const SelectParams& p_;
  const RowKernels& kernels_;
  int64_t longest_, words_;
  std::unique_ptr<uint32_t[]> scratch_;  // words_ for each worker
};

// How many threads a gather is worth.
int64_t gather_workers(const GatherParams& p, const Threads& threads);

// Bytes of what moves from which on it would not stay in the cache anyway, and is written past it.
inline constexpr int64_t kStreamed = 16 << 20;

// A gather cut into units of work: tiles of destination rows over all segments, so that skewed budgets balance.
class GatherUnits {
 public:
  GatherUnits(const GatherParams& p, int64_t workers);

  int64_t count() const { return count_; }
  void run(int64_t unit) const;  // waits for the flags in p.ready

 private:
  void move(int64_t row, int64_t begin, int64_t end) const;
  bool streamed(int64_t payload) const;

  const GatherParams& p_;
  const RowKernels& kernels_;
  int64_t bytes_;     // of one row, all payloads
  int64_t tile_ = 1;  // rows
  int64_t count_ = 0;
};

}  // namespace lkv::cpu
