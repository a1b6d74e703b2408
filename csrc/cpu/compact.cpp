#include <algorithm>

#include "lkv/cpu.h"
#include "lkv/segments.h"
#include "units.h"

// Eviction in place on the CPU: kept rows move to the front or to the back of their segment, which may lie in pages.
//
// In order, positions ascend, so rows that move one after the other, to the back the last one first, never overwrite
// one that is still to be read. A unit of work is some columns of one payload of one segment, in whole cache lines.
//
// In any order, what moves is never overwritten. First the positions are written by the rows where they will be, a unit
// for each segment. Then a unit of work is some rows of one payload of one segment.
//
// In both, a unit
//   1. lists the rows that are not in place yet: where they lie and where they go, a few at a time;
//   2. copies them, where many rows move past the cache, as a store into the cache would read the line first.

namespace lkv::cpu {
namespace {

// Columns are cut at cache lines; cutting costs speed, so only as often as there are threads to feed.
constexpr int64_t kLine = 64;
constexpr int64_t kGrain = 32 << 10;

// Rows of a list. The copies wait for memory alone, with as many rows on the way as a processor can hold.
constexpr int64_t kListed = 1024;

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

// Rows of a segment without pages.
struct InOrder {
  char* at(int64_t slot) const { return rows + slot * token; }
  int64_t bits() const { return reinterpret_cast<intptr_t>(rows) | token; }

  char* rows;
  int64_t token;
};

// Rows in pages; nullptr where the page is not one of the pool.
template <class Id>
struct InPages {
  char* at(int64_t slot) const {
    const int64_t page = ids[slot >> shift];
    if (page < 0 || page >= count) return nullptr;
    return rows + page * stride + (slot & ((int64_t{1} << shift) - 1)) * token;
  }
  int64_t bits() const { return reinterpret_cast<intptr_t>(rows) | token | stride; }

  char* rows;
  int64_t token, stride;
  const Id* ids;
  int64_t count;
  int32_t shift;
};

// Calls f with where the rows of one payload of a segment lie, from byte `begin` of each.
template <class F>
void with_rows(const CompactParams& p, const Segment& segment, int64_t payload, int64_t begin, F&& f) {
  const Strided& tokens = p.payload[payload * p.source.layers + segment.layer];
  const Pages* pages = pages_of(p, payload);
  if (pages == nullptr) return f(InOrder{segment.at(tokens, 0) + begin, tokens.token});
  char* const rows = tokens.data + segment.h * tokens.head + begin;
  const int64_t table = segment.layer * pages->layer + segment.b * pages->batch + segment.h * pages->head;
  const auto in_pages = [&]<class Id>(const Id* ids) {
    f(InPages<Id>{rows, tokens.token, tokens.batch, ids + table, pages->count, pages->shift});
  };
  if (pages->wide) {
    in_pages(static_cast<const int64_t*>(pages->tables));
  } else {
    in_pages(static_cast<const int32_t*>(pages->tables));
  }
}

struct Turn {
  int64_t position, slot;
};

// Moves `count` rows, in order: turn(i) is where row i lies and where it goes. What lies outside of the segment or of
// the pool does not move. `large`: past the cache, where rows are whole lines.
template <class Rows, class TurnOf>
void move_rows(const RowKernels& kernels, const Rows& rows, int64_t limit, int64_t bytes, bool large, int64_t count,
               TurnOf&& turn) {
  const char* from[kListed];
  char* to[kListed];
  const bool streamed = large && (rows.bits() | bytes) % kLine == 0;
  const MoveRows copy = streamed ? kernels.stream_moves(bytes) : kernels.move_rows(bytes);
  for (int64_t i = 0; i < count;) {
    int64_t listed = 0;
    for (; i < count && listed < kListed; ++i) {
      const auto [position, slot] = turn(i);
      if (position < 0 || position >= limit) continue;
      from[listed] = rows.at(position);
      to[listed] = rows.at(slot);
      // No branch, as which rows are in place already is hard to predict.
      listed += (from[listed] != nullptr) & (to[listed] != nullptr) & (from[listed] != to[listed]);
    }
    copy({from, to, listed, bytes});
  }
  if (streamed) kernels.fence();
}

void compact_columns(const CompactParams& p, const RowKernels& kernels, int64_t row, int64_t payload, int64_t begin,
                     int64_t end, bool large) {
  const Segment segment = segment_of(p.source, row);
  const Destination to = destination_of(p, segment, row);
  const int32_t* positions = p.positions + p.cu_seqlens[row];
  const Moving moving = moving_of(positions, to, p.to_back);
  with_rows(p, segment, payload, begin, [&](const auto& rows) {
    move_rows(kernels, rows, segment.limit, end - begin, large, moving.end - moving.begin, [&](int64_t i) {
      const int64_t kept = p.to_back ? moving.end - 1 - i : moving.begin + i;
      return Turn{positions[kept], to.first + kept};
    });
  });
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

void fill_rows(const CompactParams& p, const RowKernels& kernels, int64_t row, int64_t payload, int64_t begin,
               int64_t end, bool large) {
  const Segment segment = segment_of(p.source, row);
  const Destination to = destination_of(p, segment, row);
  const int32_t* filled = p.filled + p.cu_seqlens[row];
  end = std::min(end, to.count);
  with_rows(p, segment, payload, 0, [&](const auto& rows) {
    move_rows(kernels, rows, segment.limit, p.row_bytes[payload], large, end - begin,
              [&](int64_t i) { return Turn{filled[begin + i], to.first + begin + i}; });
  });
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
  const bool large = work >= kStreamed;
  for_each_unit(threads, workers, moves * pieces, [&](int64_t unit, int64_t) {
    const int64_t row = unit / pieces / p.payloads, payload = unit / pieces % p.payloads;
    int64_t begin = unit % pieces * size, end = begin + size;
    if (p.filled != nullptr) {
      if (p.row_bytes[payload] > 0) fill_rows(p, kernels, row, payload, begin, end, large);
      return;
    }
    begin *= kLine, end = std::min(end * kLine, p.row_bytes[payload]);
    if (begin < end) compact_columns(p, kernels, row, payload, begin, end, large);
  });
}

}  // namespace lkv::cpu
