#pragma once

#include "lkv/params.h"

// What the ops decide about one segment, written once for the CPU and the CUDA kernels: which rows are valid, how many
// of them stay and where they go, which of them compete by score, and which new rows fit. Everything read through a
// pointer is clamped here.

namespace lkv {

LKV_HD int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// One segment: its coordinates, where its token 0 lies, and its valid range in its own coordinates.
struct Segment {
  int64_t layer, b, h;
  int64_t origin;         // token index of position 0: 0 when dense, cu_seqlens[row] when ragged
  int64_t limit;          // positions are in [0, limit)
  int64_t begin, length;  // valid: [begin, begin + length)

  LKV_HD char* at(const Strided& t, int64_t position) const {
    return t.data + b * t.batch + h * t.head + (origin + position) * t.token;
  }
};

struct PlainLoad {
  template <class T>
  LKV_HD T operator()(const T* p) const {
    return *p;
  }
};

// `load`: how the tables are read.
template <class Load = PlainLoad>
LKV_HD Segment segment_of(const Source& s, int64_t row, Load load = {}) {
  Segment r;
  const int64_t sequence = Source::quotient(row, s.heads);  // over all layers
  r.layer = Source::quotient(sequence, s.batch);
  r.b = sequence - r.layer * s.batch;
  r.h = row - sequence * s.heads;
  const int64_t tokens = load(s.tokens + r.layer);
  r.origin = s.cu_seqlens ? clamp(load(s.cu_seqlens + row), 0, tokens) : 0;
  r.limit = s.cu_seqlens ? clamp(load(s.cu_seqlens + row + 1), r.origin, tokens) - r.origin : tokens;
  r.begin = clamp(s.starts.at(r.layer, r.b, r.h), 0, r.limit);
  r.length = clamp(s.lengths.at(r.layer, r.b, r.h), 0, r.limit - r.begin);
  return r;
}

// Row `slot` of a segment; nullptr where its page is not one of the pool.
LKV_HD char* row_at(const Pages* pages, const Segment& s, const Strided& t, int64_t slot) {
  if (pages == nullptr) return s.at(t, slot);
  const int64_t page = pages->id(s.layer, s.b, s.h, slot >> pages->shift);
  if (page < 0 || page >= pages->count) return nullptr;
  return t.data + page * t.batch + s.h * t.head + (slot & ((int64_t{1} << pages->shift) - 1)) * t.token;
}

LKV_HD const Pages* pages_of(const CompactParams& p, int64_t payload) {
  return p.pages == nullptr ? nullptr : p.pages + payload;
}

// The slots that the rows kept of a segment move to.
struct Destination {
  int64_t first, count;
};

LKV_HD Destination destination_of(const CompactParams& p, const Segment& s, int64_t row) {
  if (!p.to_back) return {0, clamp(p.lengths[row], 0, s.limit)};
  const int64_t count = clamp(p.lengths[row], 0, s.length);
  return {s.begin + s.length - count, count};
}

// In any order: the position of the row that slot first + i gets, of which `below` rows of those kept have lower
// positions. `kept`: their positions, ascending.
LKV_HD int32_t filler_of(const int32_t* kept, const Destination& to, bool to_back, int64_t i, int64_t below) {
  const int32_t next = kept[smaller(below, to.count - 1)];
  const int32_t filler = kept[clamp(to_back ? below - i - 1 : to.count + below - i - 1, 0, to.count - 1)];
  return next == to.first + i ? next : filler;
}

// See Pages::free.
LKV_HD int64_t tables_of(const CompactParams& p, const Pages& of) {
  return of.free == nullptr ? 0 : p.source.batch * (of.per_head ? p.source.heads : 1);
}

LKV_HD int64_t free_pages_of(const CompactParams& p, const Pages& of, int64_t table) {
  const int64_t readers = of.per_head ? 1 : p.source.heads;  // heads that share a table
  const int64_t per_layer = p.source.batch * p.source.heads;
  const auto pages = [&](int64_t rows) { return (rows + (int64_t{1} << of.shift) - 1) >> of.shift; };
  int64_t before = 0, after = 0, dropped = INT64_MAX;
  for (int64_t n = 0; n < p.source.layers; ++n) {
    for (int64_t i = 0; i < readers; ++i) {
      const int64_t row = n * per_layer + table * readers + i;
      const Segment segment = segment_of(p.source, row);
      const int64_t kept = destination_of(p, segment, row).count;
      dropped = smaller(dropped, (segment.length - kept) >> of.shift);
      before = clamp(pages(segment.length), before, INT64_MAX);
      after = clamp(pages(kept), after, INT64_MAX);
    }
  }
  return !p.to_back ? before - after : readers > 0 ? dropped : 0;
}

// The size of a segment's span if the output did not end.
struct SpanSize {
  int64_t wanted;  // rows that the budget alone would keep
  int64_t kept;    // rows kept
  int64_t span;    // rows and slack; at most `total`, so that sums of spans stay in range
};

LKV_HD SpanSize span_size_of(const SpansParams& p, int64_t row) {
  const Segment segment = segment_of(p.source, row);
  // What is dropped, in whole pages; without a division where pages are rows, as one of 64 bits is a call on a GPU.
  const auto rounded = [&](int64_t keep) {
    return p.page <= 1 ? keep : segment.length - (segment.length - keep) / p.page * p.page;
  };
  SpanSize size;
  const int64_t budget = clamp(p.budgets.at(segment.layer, segment.b, segment.h), 0, segment.length);
  size.wanted = rounded(budget);
  size.kept = p.max_budget < 0 ? size.wanted : rounded(smaller(budget, p.max_budget));
  if (p.padded >= 0) {
    size.kept = smaller(size.kept, p.padded);
    size.span = smaller(p.padded, p.total);
  } else {
    const int64_t used = size.kept + smaller(p.reserve, p.total);
    size.span = smaller((used + p.align - 1) / p.align * p.align, p.total);
  }
  return size;
}

// Writes where a span begins that has `before` rows of spans in front of it, and how many rows it keeps before the
// output ends. Returns how many rows of the budget are cut.
LKV_HD int64_t write_span(const SpansParams& p, int64_t row, const SpanSize& size, int64_t before) {
  const int64_t begin = smaller(before, p.total), kept = smaller(size.kept, p.total - begin);
  p.cu_seqlens[row] = static_cast<int32_t>(begin);
  p.lengths[row] = static_cast<int32_t>(kept);
  if (p.ready != nullptr) p.ready[row] = 0;
  return size.wanted - kept;
}

// Writes the end of the last span, and how many rows were cut in all.
LKV_HD void write_end(const SpansParams& p, int64_t before, int64_t cut) {
  p.cu_seqlens[p.source.rows()] = static_cast<int32_t>(smaller(before, p.total));
  if (p.overflow != nullptr) *p.overflow = static_cast<int32_t>(smaller(cut, INT32_MAX));
}

// What select keeps of one segment: of its valid tokens the first `sink`, the last `window`, and of the `count` tokens
// between, which compete by score, the `wanted` best.
struct Selection {
  int64_t begin, length;  // valid positions
  int64_t out, span;      // where the span lies in the output
  int64_t keep, sink, window;
  const char* scores;  // of the first token that competes
  int64_t stride;      // bytes from one score to the next
  uint32_t count, wanted;

  LKV_HD bool decided() const { return wanted == 0 || wanted == count; }
};

// `longest`: the length that a caller has scratch for. A segment is longer only if its offsets are written to
// meanwhile.
LKV_HD Selection selection_of(const SelectParams& p, int64_t row, int64_t longest = INT64_MAX) {
  // Loaded first, so that none of these waits for another.
  const int64_t out = p.cu_seqlens[row], end = p.cu_seqlens[row + 1], keep = p.lengths[row];
  const Strided scores = p.scores[p.source.layer_of(row)];
  const Segment segment = segment_of(p.source, row);
  Selection s;
  s.begin = segment.begin;
  s.length = smaller(segment.length, longest);
  s.out = clamp(out, 0, p.total);
  s.span = clamp(end, s.out, p.total) - s.out;
  s.keep = clamp(keep, 0, smaller(s.length, s.span));
  s.sink = clamp(p.sink, 0, s.keep);
  s.window = clamp(p.window, 0, s.keep - s.sink);
  s.count = static_cast<uint32_t>(s.length - s.sink - s.window);
  s.wanted = static_cast<uint32_t>(s.keep - s.sink - s.window);
  s.scores = segment.at(scores, s.begin + s.sink);
  s.stride = scores.token;
  return s;
}

// A segment of a ragged cache [T, ...], wherever cu_seqlens and lengths point.
struct Span {
  int64_t begin, size;  // rows [begin, begin + size) of T
  int64_t length;       // rows in use, the first of them
};

LKV_HD Span span_of(const int32_t* cu_seqlens, const int32_t* lengths, int64_t tokens, int64_t row) {
  const int64_t begin = clamp(cu_seqlens[row], 0, tokens);
  const int64_t size = clamp(cu_seqlens[row + 1], begin, tokens) - begin;
  return {begin, size, clamp(lengths[row], 0, size)};
}

// The rows that queries attend to.
LKV_HD Span attended_span(const AttendParams& p, int64_t row) {
  Span span = span_of(p.cu_seqlens, p.lengths, p.tokens, row);
  span.length = clamp(span.length, 0, p.longest);
  return span;
}

// The new rows of one segment that fit behind those in use.
struct Appended {
  int64_t first, rows;  // they become rows [first, first + rows) of T
  int64_t token;        // the first of them, of `count`; those before it are padding
  int64_t length;       // rows in use afterwards
};

LKV_HD Appended appended_of(const AppendParams& p, int64_t row) {
  const Span span = span_of(p.cu_seqlens, p.lengths, p.tokens, row);
  const int64_t valid = clamp(p.valid.at(0, row / p.heads, row % p.heads), 0, p.count);
  const int64_t fit = smaller(valid, span.size - span.length);
  return {span.begin + span.length, fit, p.count - valid, span.length + fit};
}

}  // namespace lkv
