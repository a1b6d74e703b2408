#include <algorithm>
#include <atomic>
#include <numeric>

#include "lkv/segments.h"
#include "pivot.h"
#include "units.h"

// Select on the CPU. A unit of work is one segment:
//   1. Plan: sink and window are known positions; the valid tokens between them compete by score (selection_of).
//   2. Pivot: find the key of the last row kept, and how many of the rows with the same key stay (pivot.h).
//   3. Emit: one pass over the scores writes, in order, the positions of all keys above the pivot and of the first
//      ties. It stores whole vectors, which may write past the last position.
//   4. Fill in the sink, the window and, in the slack, -1, over what step 3 wrote there.
//   5. Set the flag of the segment: a gather that runs beside may now move its rows.
// Steps 2 and 3 read the scores through the row kernels of the instruction set (row_kernels.h).

namespace lkv::cpu {
namespace {

// Scores below which another thread is not worth waking.
constexpr int64_t kGrain = 16384;

int32_t* count_up(int32_t* out, int64_t count, int64_t first) {
  std::iota(out, out + count, static_cast<int32_t>(first));
  return out + count;
}

void select_row(const SelectParams& p, const RowKernels& kernels, int64_t row, int64_t longest, uint32_t* scratch) {
  const Selection s = selection_of(p, row, longest);
  int32_t* const begin = p.positions + s.out;
  // The last segment also clears what lies behind its span.
  int32_t* const end = row + 1 == p.source.rows() ? p.positions + p.total : begin + s.span;
  int32_t* const out = begin + s.sink;
  const int64_t first = s.begin + s.sink;
  if (s.decided()) {
    count_up(out, s.wanted, first);
  } else {
    const ScoreRow rivals(kernels, p.type, s.scores, s.stride, s.count);
    const Pivot pivot = find_pivot(kernels, rivals, s.wanted, scratch);
    // A vector may write past the last position, into the window's place and the slack, which are filled below.
    Emitted done = {0, 0};
    rivals.for_each_piece([&](const void* items, int64_t n, int64_t i) {
      const Emitted more = rivals.kernels().emit(items, n, pivot.key, pivot.ties - done.ties, first + i,
                                                 out + done.count, end - out - done.count);
      done.count += more.count;
      done.ties += more.ties;
    });
    // Fewer only if the scores were written to meanwhile.
    if (done.count < s.wanted) std::fill(out + done.count, out + s.wanted, -1);
  }
  count_up(begin, s.sink, s.begin);
  int32_t* const slack = count_up(out + s.wanted, s.window, s.begin + s.length - s.window);
  std::fill(slack, end, -1);
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
