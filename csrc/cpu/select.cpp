#include <algorithm>
#include <atomic>
#include <numeric>

#include "pivot.h"
#include "select_units.h"

namespace lkv::cpu {
namespace {

// Scores that are worth a thread of their own.
constexpr int64_t kGrain = 16384;

// Where a segment's positions go: `kept` of them, then slack up to `end`.
struct Span {
  int32_t *begin, *end;
  int64_t kept;
};

Span span_of(const SelectParams& p, const Segment& segment, int64_t row, int64_t rows) {
  const int64_t begin = clamp(p.cu_seqlens[row], 0, p.total);
  const int64_t end = row + 1 == rows ? p.total : clamp(p.cu_seqlens[row + 1], begin, p.total);
  const int64_t kept = clamp(p.lengths[row], 0, std::min(segment.length, end - begin));
  return {p.positions + begin, p.positions + end, kept};
}

int32_t* count_up(int32_t* out, int64_t count, int64_t first) {
  std::iota(out, out + count, static_cast<int32_t>(first));
  return out + count;
}

void select_row(const SelectParams& p, const RowKernels& kernels, int64_t row, int64_t longest, uint32_t* scratch) {
  Segment segment = segment_of(p.source, row);
  segment.length = std::min(segment.length, longest);  // whoever else writes to cu_seqlens: the scratch is for no more
  const Span span = span_of(p, segment, row, p.source.rows());
  const int64_t sink = clamp(p.sink, 0, span.kept);
  const int64_t window = clamp(p.window, 0, span.kept - sink);
  const int64_t best = span.kept - sink - window;
  const int64_t first = segment.begin + sink, count = segment.length - sink - window;
  int32_t* out = span.begin + sink;
  if (best == count) {
    count_up(out, best, first);
  } else if (best > 0) {
    const Strided& scores = p.scores[segment.layer];
    const ScoreRow rivals(kernels, p.type, segment.at(scores, first), scores.token, count);
    const Pivot pivot = find_pivot(kernels, rivals, best, scratch);
    // What a whole vector writes too much falls into the window's place and the slack, which are filled below.
    Emitted done = {0, 0};
    rivals.for_each_piece([&](const void* items, int64_t n, int64_t i) {
      const Emitted more = rivals.kernels().emit(items, n, pivot.key, pivot.ties - done.ties, first + i,
                                                 out + done.count, span.end - out - done.count);
      done.count += more.count;
      done.ties += more.ties;
    });
    // Fewer only if somebody wrote to the scores meanwhile.
    if (done.count < best) std::fill(out + done.count, out + best, -1);
  }
  count_up(span.begin, sink, segment.begin);
  int32_t* end = count_up(out + best, window, segment.begin + segment.length - window);
  std::fill(end, span.end, -1);
  if (p.ready != nullptr) std::atomic_ref<uint32_t>(p.ready[row]).store(1, std::memory_order_release);
}

int64_t longest_row(const Source& source) {
  if (source.rows() == 0) return 0;
  if (source.cu_seqlens == nullptr) return *std::max_element(source.tokens, source.tokens + source.layers);
  int64_t longest = 0;
  for (int64_t row = 0; row < source.rows(); ++row) longest = std::max(longest, segment_of(source, row).limit);
  return longest;
}

}  // namespace

int64_t select_workers(const SelectParams& p, const Threads& threads) {
  const int64_t rows = p.source.rows();
  return useful_workers(threads, rows, rows * longest_row(p.source), kGrain);
}

SelectUnits::SelectUnits(const SelectParams& p, int64_t workers)
    : p_(p), kernels_(row_kernels()), longest_(longest_row(p.source)), words_(pivot_scratch(longest_)) {
  scratch_.reset(new uint32_t[static_cast<size_t>(workers * words_)]);
}

void SelectUnits::run(int64_t unit, int64_t worker) const {
  if (p_.source.rows() == 0) {
    std::fill_n(p_.positions, p_.total, -1);
  } else {
    select_row(p_, kernels_, unit, longest_, scratch_.get() + worker * words_);
  }
}

void select(const SelectParams& p, const Threads& threads) {
  const int64_t workers = select_workers(p, threads);
  const SelectUnits units(p, workers);
  for_each_unit(threads, workers, units.count(), [&](int64_t unit, int64_t worker) { units.run(unit, worker); });
}

}  // namespace lkv::cpu
