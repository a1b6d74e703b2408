#pragma once

#include "row_kernels.h"
#include "units.h"

namespace lkv::cpu {

// How many threads a gather is worth.
int64_t gather_workers(const GatherParams& p, const Threads& threads);

// A gather cut into units of work: tiles of destination rows over all segments, so that skewed budgets balance.
class GatherUnits {
 public:
  GatherUnits(const GatherParams& p, int64_t workers);

  int64_t count() const { return count_; }
  void run(int64_t unit) const;  // waits where p.ready says so

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
