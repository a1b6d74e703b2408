#include "lkv/cpu.h"
#include "lkv/segments.h"

// One pass over the segments: how many rows each keeps, and where its span begins, which is the sum of the spans before
// it. The rules are in lkv/segments.h.

namespace lkv::cpu {

void spans(const SpansParams& p) {
  int64_t before = 0, cut = 0;
  for (int64_t row = 0; row < p.source.rows(); ++row) {
    const SpanSize size = span_size_of(p, row);
    cut += write_span(p, row, size, before);
    before += size.span;
  }
  write_end(p, before, cut);
}

}  // namespace lkv::cpu
