#include <algorithm>

#include "lkv/cpu.h"
#include "lkv/segments.h"
#include "units.h"

// Eviction in place on the CPU: kept rows move to the front of their segment. Positions ascend, so rows that move in
// order never overwrite one that is still to be read. A unit of work is some columns of one payload of one segment:
//   1. Skip the rows that are in place already.
//   2. Copy the others, in order, each to the next free row.
// Threads share a segment by its columns, in whole cache lines.

namespace lkv::cpu {
namespace {

// Columns are cut at cache lines; cutting costs speed, so only as often as there are threads to feed.
constexpr int64_t kLine = 64;
constexpr int64_t kGrain = 32 << 10;

// Rows already in place come first, as positions ascend.
int64_t in_place(const int32_t* positions, int64_t count) {
  int64_t i = 0;
  while (i < count && positions[i] == i) ++i;
  return i;
}

void compact_columns(const CompactParams& p, const RowKernels& kernels, int64_t row, int64_t payload, int64_t begin,
                     int64_t end) {
  const Segment segment = segment_of(p.source, row);
  const Strided& tokens = p.payload[payload * p.source.layers + segment.layer];
  const int32_t* positions = p.positions + p.cu_seqlens[row];
  const int64_t count = clamp(p.lengths[row], 0, segment.limit);
  const int64_t still = in_place(positions, count);
  const CopyRows copy = kernels.copy_rows(end - begin);
  copy({segment.at(tokens, still) + begin, tokens.token, segment.at(tokens, 0) + begin, tokens.token, positions + still,
        count - still, segment.limit, end - begin});
}

}  // namespace

void compact(const CompactParams& p, const Threads& threads) {
  const int64_t rows = p.source.rows();
  if (rows == 0 || p.payloads == 0) return;
  const RowKernels& kernels = row_kernels();
  const int64_t widest = *std::max_element(p.row_bytes, p.row_bytes + p.payloads);
  if (widest == 0) return;
  int64_t kept = 0;
  for (int64_t row = 0; row < rows; ++row) kept += p.lengths[row];
  const int64_t work = kept * p.payloads * widest;
  const int64_t lines = (widest + kLine - 1) / kLine;
  const int64_t workers = useful_workers(threads, rows * p.payloads * lines, work, kGrain);
  const int64_t wanted = workers > 1 ? (4 * workers + rows * p.payloads - 1) / (rows * p.payloads) : 1;
  const int64_t slices = std::min(lines, wanted);
  const int64_t width = (lines + slices - 1) / slices * kLine;
  for_each_unit(threads, workers, rows * p.payloads * slices, [&](int64_t unit, int64_t) {
    const int64_t payload = unit / slices % p.payloads;
    const int64_t begin = unit % slices * width, end = std::min(begin + width, p.row_bytes[payload]);
    if (begin < end) compact_columns(p, kernels, unit / slices / p.payloads, payload, begin, end);
  });
}

}  // namespace lkv::cpu
