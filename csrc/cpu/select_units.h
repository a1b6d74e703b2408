#pragma once

#include <memory>

#include "row_kernels.h"
#include "units.h"

namespace lkv::cpu {

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

}  // namespace lkv::cpu
