#include <algorithm>

#include "lkv/cpu.h"
#include "lkv/segments.h"
#include "units.h"

// Eviction in place on the CPU: kept rows move to the front or to the back of their segment, which may lie in pages.
// Positions ascend, so rows that move in order, to the back the last one first, never overwrite one that is still to be
// read. A unit of work is some columns of one payload of one segment:
//   1. Skip the rows that are in place already.
//   2. Copy the others, in order, each to its new row.
// Threads share a segment by its columns, in whole cache lines.

namespace lkv::cpu {
namespace {

// Columns are cut at cache lines; cutting costs speed, so only as often as there are threads to feed.
constexpr int64_t kLine = 64;
constexpr int64_t kGrain = 32 << 10;

// The rows [begin, end) of those kept that are not in place. Rows in place come first, or last of those that move to
// the back, as positions ascend.
struct Moving {
  int64_t begin, end;
};

Moving moving_of(const int32_t* positions, const Destination& to, bool to_back) {
  Moving m{0, to.count};
  if (to_back) {
    while (m.end > 0 && positions[m.end - 1] == to.first + m.end - 1) --m.end;
  } else {
    while (m.begin < m.end && positions[m.begin] == to.first + m.begin) ++m.begin;
  }
  return m;
}

void compact_columns(const CompactParams& p, const RowKernels& kernels, int64_t row, int64_t payload, int64_t begin,
                     int64_t end) {
  const Segment segment = segment_of(p.source, row);
  const Destination to = destination_of(p, segment, row);
  const Strided& tokens = p.payload[payload * p.source.layers + segment.layer];
  const int32_t* positions = p.positions + p.cu_seqlens[row];
  const Moving moving = moving_of(positions, to, p.to_back);
  RowMove move{};
  move.rows = segment.at(tokens, 0) + begin;
  move.token = tokens.token;
  if (p.pages.tables != nullptr) {
    move.rows = tokens.data + segment.h * tokens.head + begin;
    const int64_t table = segment.layer * p.pages.layer + segment.b * p.pages.batch + segment.h * p.pages.head;
    move.table = static_cast<const char*>(p.pages.tables) + table * (p.pages.wide ? 8 : 4);
    move.page = tokens.batch;
    move.count = p.pages.count;
    move.shift = p.pages.shift;
    move.wide = p.pages.wide;
  }
  move.positions = positions + moving.begin;
  move.first = to.first + moving.begin;
  move.moved = moving.end - moving.begin;
  move.limit = segment.limit;
  move.bytes = end - begin;
  move.backward = p.to_back;
  kernels.move_rows(move.bytes)(move);
}

}  // namespace

void compact(const CompactParams& p, const Threads& threads) {
  for (int64_t table = 0; p.free_pages != nullptr && table < tables_of(p); ++table)
    p.free_pages[table] = static_cast<int32_t>(free_pages_of(p, table));
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
