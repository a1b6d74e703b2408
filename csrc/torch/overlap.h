#pragma once

#include "tensors.h"

// True byte overlap of strided tensors: interleaved views of one storage (K | V in one row) do not overlap although
// their extents do. Exact unless the strides are pathological; then the answer is "overlap", the safe one.

namespace lkv::torch_ops {

bool overlaps_itself(const Tensor& t);
bool overlap(const Tensor& a, const Tensor& b);

// Writing ops: each written tensor has memory of its own, apart from the other written ones and from what is read.
void check_disjoint(const std::vector<Named>& written, const std::vector<Named>& read);

}  // namespace lkv::torch_ops
