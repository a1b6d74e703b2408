#pragma once

#include <optional>

#include "array.h"
#include "lkv/soft_topk.h"

// The checks of the arrays of soft_topk and of its gradient.

namespace lkv::host {

// One number per row: an array that broadcasts to the leading axes of the scores, or the same for all.
struct PerRow {
  std::optional<Array> array;
  double value = 0;
};

// The rows of an array [..., n]; raises unless the numbers fit it.
SoftRows soft_rows(const Named& array, const PerRow& k, const PerRow& temperature, const std::optional<Array>& lengths);

// Raises unless scores [..., n] are floats with a contiguous last axis. The outputs are not set.
SoftTopkParams check_soft_topk(const Array& scores, const PerRow& k, const PerRow& temperature,
                               const std::optional<Array>& lengths, bool log);

}  // namespace lkv::host
