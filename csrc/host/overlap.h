#pragma once

#include "array.h"

// True byte overlap of strided arrays: interleaved views of one storage (K | V in one row) do not overlap although
// their extents do. Exact unless the strides are pathological; then the answer is "overlap", the safe one.

namespace lkv::host {

bool overlaps_itself(const Array& a);
bool overlap(const Array& a, const Array& b);

// Writing ops: each written array has memory of its own, apart from the other written ones and from what is read.
void check_disjoint(const std::vector<Named>& written, const std::vector<Named>& read);

}  // namespace lkv::host
