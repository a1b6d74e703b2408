#include <algorithm>
#include <atomic>
#include <numeric>

#include "pivot.h"
#include "select_units.h"

namespace lkv::cpu {
namespace {

// Scores that are worth a thread of their own.
constexpr int64_t kGrain = 16384;

// Where a row set's positions go: `kept` of them, then slack up to `end`.
struct Room {
  int32_t *begin, *end;
  int64_t kept;
};

Room room_of(const SelectParams& p, const RowSet& set, int64_t row, int64_t rows) {
  const int64_t begin = clamp(p.cu_seqlens[row], 0, p.total);
  const int64_t end = row + 1 == rows ? p.total : clamp(p.cu_seqlens[row + 1], begin, p.total);
  const int64_t kept = clamp(p.lengths[row], 0, std::min(set.length, end - begin));
  return {p.positions + begin, p.positions + end, kept};
}

int32_t* count_up(int32_t* out, int64_t count, int64_t first) {
  std::iota(out, out + count, static_cast<int32_t>(first));
  return out + count;
}

void select_row(const SelectParams& p, const RowKernels& kernels, int64_t row, int64_t longest, uint32_t* scratch) {
  RowSet set = row_set(p.source, row);
  set.length = std::min(set.length, longest);  // whoever else writes to cu_seqlens: the scratch is for no more
  const Room room = room_of(p, set, row, p.source.rows());
  const int64_t sink = clamp(p.sink, 0, room.kept);
  const int64_t window = clamp(p.window, 0, room.kept - sink);
  const int64_t best = room.kept - sink - window;
  const int64_t first = set.begin + sink, count = set.length - sink - window;
  int32_t* out = room.begin + sink;
  if (best == count) {
    count_up(out, best, first);
  } else if (best > 0) {
    const Strided& scores = p.scores[set.layer];
    const ScoreRow rivals(kernels, p.type, set.at(scores, first), scores.token, count);
    const Pivot pivot = find_pivot(kernels, rivals, best, scratch);
    // What a whole vector writes too much falls into the window's place and the slack, which are filled below.
    Emitted done = {0, 0};
    rivals.for_each_piece([&](const void* items, int64_t n, int64_t i) {
      const Emitted more = rivals.kernels().emit(items, n, pivot.key, pivot.ties - done.ties, first + i,
                                                 out + done.count, room.end - out - done.count);
      done.count += more.count;
      done.ties += more.ties;
    });
    // Fewer only if somebody wrote to the scores meanwhile.
    if (done.count < best) std::fill(out + done.count, out + best, -1);
  }
  count_up(room.begin, sink, set.begin);
  int32_t* end = count_up(out + best, window, set.begin + set.length - window);
  std::fill(end, room.end, -1);
  if (p.ready != nullptr) std::atomic_ref<uint32_t>(p.ready[row]).store(1, std::memory_order_release);
}

int64_t longest_row(const Source& source) {
  if (source.rows() == 0) return 0;
  if (source.cu_seqlens == nullptr) return *std::max_element(source.tokens, source.tokens + source.layers);
  int64_t longest = 0;
  for (int64_t row = 0; row < source.rows(); ++row) longest = std::max(longest, row_set(source, row).limit);
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
