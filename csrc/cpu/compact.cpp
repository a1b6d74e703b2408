#include <algorithm>

#include "lkv/cpu.h"
#include "lkv/segments.h"
#include "units.h"

// Eviction in place on the CPU: kept rows move to the front or to the back of their segment, which may lie in pages.
//
// In order, positions ascend, so rows that move one after the other, to the back the last one first, never overwrite
// one that is still to be read. A unit of work is some columns of one payload of one segment, in whole cache lines:
//   1. Skip the rows that are in place already.
//   2. Copy the others, in order, each to its new row.
//
// In any order, what moves is never overwritten. First the positions are written by the rows where they will be, a unit
// for each segment. Then a unit of work is some rows of one payload of one segment:
//   1. List those that are not there yet, a few at a time.
//   2. Copy them, past the cache where there are many: they go to lines that nobody has read.

namespace lkv::cpu {
namespace {

// Columns are cut at cache lines; cutting costs speed, so only as often as there are threads to feed.
constexpr int64_t kLine = 64;
constexpr int64_t kGrain = 32 << 10;
constexpr int64_t kListed = 256;  // rows

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

// Bytes [begin, end) of the rows of a segment; which of them move is the caller's to fill in.
RowMove columns_of(const CompactParams& p, const Segment& segment, int64_t payload, int64_t begin, int64_t end) {
  const Strided& tokens = p.payload[payload * p.source.layers + segment.layer];
  RowMove move{};
  move.rows = segment.at(tokens, 0) + begin;
  move.token = tokens.token;
  if (const Pages* pages = pages_of(p, payload)) {
    move.rows = tokens.data + segment.h * tokens.head + begin;
    const int64_t table = segment.layer * pages->layer + segment.b * pages->batch + segment.h * pages->head;
    move.table = static_cast<const char*>(pages->tables) + table * (pages->wide ? 8 : 4);
    move.page = tokens.batch;
    move.count = pages->count;
    move.shift = pages->shift;
    move.wide = pages->wide;
  }
  move.limit = segment.limit;
  move.bytes = end - begin;
  return move;
}

void compact_columns(const CompactParams& p, const RowKernels& kernels, int64_t row, int64_t payload, int64_t begin,
                     int64_t end) {
  const Segment segment = segment_of(p.source, row);
  const Destination to = destination_of(p, segment, row);
  const int32_t* positions = p.positions + p.cu_seqlens[row];
  const Moving moving = moving_of(positions, to, p.to_back);
  RowMove move = columns_of(p, segment, payload, begin, end);
  move.positions = positions + moving.begin;
  move.first = to.first + moving.begin;
  move.moved = moving.end - moving.begin;
  move.backward = p.to_back;
  kernels.move_rows(move.bytes)(move);
}

void write_filled(const CompactParams& p, int64_t row) {
  const Destination to = destination_of(p, segment_of(p.source, row), row);
  const int32_t* kept = p.positions + p.cu_seqlens[row];
  int32_t* filled = p.filled + p.cu_seqlens[row];
  int64_t below = std::lower_bound(kept, kept + to.count, to.first) - kept;
  for (int64_t i = 0; i < to.count; ++i) {
    filled[i] = filler_of(kept, to, p.to_back, i, below);
    below += below < to.count && kept[below] == to.first + i;
  }
}

// `large`: rows are written past the cache where they lie in whole lines.
void fill_rows(const CompactParams& p, const RowKernels& kernels, int64_t row, int64_t payload, int64_t begin,
               int64_t end, bool large) {
  const Segment segment = segment_of(p.source, row);
  const Destination to = destination_of(p, segment, row);
  const int32_t* filled = p.filled + p.cu_seqlens[row];
  RowMove move = columns_of(p, segment, payload, 0, p.row_bytes[payload]);
  int32_t positions[kListed], slots[kListed];
  move.positions = positions;
  move.slots = slots;
  const auto bits = reinterpret_cast<intptr_t>(move.rows) | move.token | move.page | move.bytes;
  const bool streamed = large && bits % kLine == 0;
  const MoveRows move_rows = streamed ? kernels.stream_moves(move.bytes) : kernels.move_rows(move.bytes);
  for (int64_t i = begin; i < std::min(end, to.count);) {
    for (move.moved = 0; i < std::min(end, to.count) && move.moved < kListed; ++i) {
      positions[move.moved] = filled[i];
      slots[move.moved] = static_cast<int32_t>(to.first + i);
      move.moved += filled[i] != to.first + i;
    }
    move_rows(move);
  }
  if (streamed) kernels.fence();
}

}  // namespace

void compact(const CompactParams& p, const Threads& threads) {
  for (int64_t payload = 0; p.pages != nullptr && payload < p.payloads; ++payload) {
    const Pages& pages = p.pages[payload];
    for (int64_t table = 0; table < tables_of(p, pages); ++table)
      pages.free[table] = static_cast<int32_t>(free_pages_of(p, pages, table));
  }
  const int64_t rows = p.source.rows();
  int64_t kept = 0, longest = 0;
  for (int64_t row = 0; row < rows; ++row) {
    kept += p.lengths[row];
    longest = std::max<int64_t>(longest, p.lengths[row]);
  }
  if (p.filled != nullptr) {
    std::copy_n(p.positions, p.total, p.filled);  // the slack
    for_each_unit(threads, useful_workers(threads, rows, kept, kGrain), rows,
                  [&](int64_t row, int64_t) { write_filled(p, row); });
  }
  const int64_t widest = p.payloads == 0 ? 0 : *std::max_element(p.row_bytes, p.row_bytes + p.payloads);
  if (kept == 0 || widest == 0) return;
  const RowKernels& kernels = row_kernels();
  const int64_t work = kept * p.payloads * widest, moves = rows * p.payloads;
  const int64_t most = p.filled != nullptr ? longest : (widest + kLine - 1) / kLine;  // pieces of a move
  const int64_t workers = useful_workers(threads, moves * most, work, kGrain);
  const int64_t pieces = std::min(most, workers > 1 ? (4 * workers + moves - 1) / moves : 1);
  const int64_t size = (most + pieces - 1) / pieces;
  for_each_unit(threads, workers, moves * pieces, [&](int64_t unit, int64_t) {
    const int64_t row = unit / pieces / p.payloads, payload = unit / pieces % p.payloads;
    int64_t begin = unit % pieces * size, end = begin + size;
    if (p.filled != nullptr) {
      if (p.row_bytes[payload] > 0) fill_rows(p, kernels, row, payload, begin, end, work >= kStreamed);
      return;
    }
    begin *= kLine, end = std::min(end * kLine, p.row_bytes[payload]);
    if (begin < end) compact_columns(p, kernels, row, payload, begin, end);
  });
}

}  // namespace lkv::cpu
