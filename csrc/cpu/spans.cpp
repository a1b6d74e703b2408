#include <algorithm>
#include <limits>

#include "lkv/cpu.h"

namespace lkv::cpu {

void spans(const SpansParams& p) {
  const int64_t rows = p.source.rows();
  const int64_t align = std::max<int64_t>(p.align, 1);
  const int64_t most = p.padded > 0 ? std::min(p.max_budget, p.padded) : p.max_budget;
  int64_t begin = 0, cut = 0;
  p.cu_seqlens[0] = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const Segment segment = segment_of(p.source, row);
    const int64_t wanted = clamp(p.budgets.at(segment.layer, segment.b, segment.h), 0, segment.length);
    const int64_t kept = clamp(most, 0, wanted);
    const int64_t span = p.padded > 0 ? p.padded : (kept + p.reserve + align - 1) / align * align;
    const int64_t left = p.total - begin;
    p.lengths[row] = static_cast<int32_t>(std::min(kept, left));
    cut += wanted - p.lengths[row];
    begin += std::min(span, left);
    p.cu_seqlens[row + 1] = static_cast<int32_t>(begin);
    if (p.ready != nullptr) p.ready[row] = 0;
  }
  if (p.overflow != nullptr) {
    *p.overflow = static_cast<int32_t>(std::min<int64_t>(cut, std::numeric_limits<int32_t>::max()));
  }
}

}  // namespace lkv::cpu
