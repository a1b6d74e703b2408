#include "pivot.h"

#include <algorithm>
#include <bit>
#include <cmath>

// The search for the pivot, the rank-th largest key of a row.
//   Up to 2048 scores: make all keys, and count how many are above one trial key after another.
//   Longer rows:
//   1. Sample 512 to 4096 scores. Two of their keys bracket the pivot, some standard deviations of its rank apart.
//   2. One pass over the row collects the keys inside of the bracket and counts those above it.
//   3. If the pivot is not in the bracket, a histogram of the row finds its first digit, and a second pass collects the
//      keys with that digit. A sample only decides how long the search takes, never what it finds.
//   4. Narrow the collected keys digit by digit until 2048 are left, or all of them stay, or all are equal.
//   5. Search the rest by trial keys: interpolated where the interval is narrow, halved where that gains too little.

namespace lkv::cpu {
namespace {

constexpr uint32_t kHighest = 0xffffffffu;

// Up to here, counting against one trial key after another beats any histogram.
constexpr int64_t kSearched = 2048;

// An interval as narrow as this, of floats between two powers of two, has its keys spread evenly enough for a guess.
constexpr uint32_t kNarrow = 1u << 23;

int64_t bin_words(int64_t size) {
  return size > kSearched ? kCopies * kBins : 0;
}

// Keys among which the pivot is: `size` keys in [low, high], of which it is the rank-th largest.
struct Range {
  uint32_t low, high;
  int64_t size, rank;
};

// Part of the line of keys, and how many keys of a buffer are at least `low` and above `high`.
struct Interval {
  uint32_t low, high;
  int64_t reach, above;

  uint32_t middle() const { return low + (high - low) / 2; }
  // Where the rank-th largest would be if keys were spread evenly.
  uint32_t guess(int64_t rank) const {
    const double share = static_cast<double>(reach - rank) / static_cast<double>(reach - above);
    return low + static_cast<uint32_t>(share * (high - low));
  }
};

class PivotSearch {
 public:
  PivotSearch(const RowKernels& kernels, const ScoreRow& row, uint32_t* scratch)
      : kernels_(kernels.keys), row_(row), bins_(scratch), keys_(scratch + bin_words(row.size())) {}

  Pivot find(int64_t rank) {
    const Range all = {0, kHighest, row_.size(), rank};
    if (row_.size() <= kSearched) {
      row_.for_each_piece(
          [&](const void* items, int64_t count, int64_t first) { row_.kernels().keys(items, count, keys_ + first); });
      return search(row_.size(), {all.low, all.high, all.size, 0}, rank);
    }
    // A sample of the row brackets the pivot; where it misleads, two passes find the first digit.
    Range bracket = sample_bracket(all);
    const Collected found = collect(bracket.low, bracket.high);
    bracket.size = found.inside;
    bracket.rank = rank - found.above;
    if (bracket.rank > 0 && bracket.rank <= bracket.size) return refine(bracket);
    const int shift = digit_shift(all);
    clear_bins();
    row_.for_each_piece([&](const void* items, int64_t count, int64_t) {
      row_.kernels().histogram(items, count, all.low, shift, bins_);
    });
    Range digit = digit_of_pivot(all, shift);
    // As many as were counted, unless the scores are written to meanwhile: then any pivot will do, but keys in the
    // scratch that do not have this digit must not be counted.
    digit.size = collect(digit.low, digit.high).inside;
    if (digit.size == 0) return {digit.high, 0};
    digit.rank = std::min(digit.rank, digit.size);
    return refine(digit);
  }

 private:
  // The row's keys in [low, high], into keys_.
  Collected collect(uint32_t low, uint32_t high) {
    Collected sum = {0, 0};
    row_.for_each_piece([&](const void* items, int64_t count, int64_t) {
      const Collected found = row_.kernels().collect(items, count, low, high, keys_ + sum.inside);
      sum.above += found.above;
      sum.inside += found.inside;
    });
    return sum;
  }

  bool settled(const Range& range) const {
    return range.rank == range.size || range.high - range.low < uint32_t{1} << row_.unit_bits();
  }

  // keys_ holds the range's keys: digit by digit until few are left.
  Pivot refine(Range range) {
    while (range.size > kSearched && !settled(range)) {
      const int shift = digit_shift(range);
      clear_bins();
      kernels_.histogram(keys_, range.size, range.low, shift, bins_);
      const Range digit = digit_of_pivot(range, shift);
      if (!settled(digit)) kernels_.collect(keys_, range.size, digit.low, digit.high, keys_);
      range = digit;
    }
    // All of them: `low` is not 0 then, or the whole row would be kept.
    if (range.rank == range.size) return {range.low - 1, 0};
    if (settled(range)) return {range.low, range.rank};
    return search(range.size, {range.low, range.high, range.size, 0}, range.rank);
  }

  // Among the first `size` of keys_: for a key that exactly `rank` are above, or else for the rank-th largest. A guess
  // that does not even halve the interval is followed by a halving.
  Pivot search(int64_t size, Interval in, int64_t rank) const {
    bool guess = true;
    while (in.low < in.high) {
      const uint32_t width = in.high - in.low;
      const uint32_t key = (guess && width < kNarrow ? in.guess(rank) : in.middle()) & ~(unit() - 1);
      if (narrow(size, in, key, rank) == rank) return {key, 0};
      guess = !guess || in.high - in.low <= width / 2;
    }
    return {in.high, rank - in.above};
  }

  // Cuts the interval at a key, on the side where the rank-th largest is not. Returns how many are above the key.
  int64_t narrow(int64_t size, Interval& in, uint32_t key, int64_t rank) const {
    const int64_t count = kernels_.count_above(keys_, size, key);
    if (count < rank) {
      in.high = key;
      in.above = count;
    } else {
      in.low = key + unit();
      in.reach = count;
    }
    return count;
  }

  uint32_t unit() const { return uint32_t{1} << row_.unit_bits(); }

  int digit_shift(const Range& range) const {
    const int bits = std::bit_width(range.high - range.low);
    return std::max(row_.unit_bits(), bits - kDigitBits);
  }

  void clear_bins() { std::fill_n(bins_, kCopies * kBins, 0u); }

  Range digit_of_pivot(const Range& range, int shift) {
    for (int copy = 1; copy < kCopies; ++copy) {
      for (int bin = 0; bin < kBins; ++bin) bins_[bin] += bins_[copy * kBins + bin];
    }
    constexpr int kBlock = 64;
    int64_t above = 0;
    int bin = kBins;
    for (; bin > 0; bin -= kBlock) {
      uint32_t block = 0;
      for (int i = 1; i <= kBlock; ++i) block += bins_[bin - i];
      if (above + block >= range.rank) break;
      above += block;
    }
    while (above + bins_[--bin] < range.rank) above += bins_[bin];
    const uint32_t low = range.low + (static_cast<uint32_t>(bin) << shift);
    const uint32_t width = (uint32_t{1} << shift) - 1;
    return {low, low + std::min(width, range.high - low), bins_[bin], range.rank - above};
  }

  // Two keys of a sample, some standard deviations of its rank to either side of the pivot's.
  Range sample_bracket(const Range& all) {
    const int bits = std::clamp(static_cast<int>(std::bit_width(static_cast<uint64_t>(all.size))) - 8, 9, 12);
    const int64_t sample = int64_t{1} << bits;
    row_.sample(bits, keys_);
    const double share = static_cast<double>(all.rank) / static_cast<double>(all.size);
    const double center = share * static_cast<double>(sample);
    const double margin = 3.5 * std::sqrt(center * (1 - share)) + 2;
    const auto upper = static_cast<int64_t>(center - margin), lower = static_cast<int64_t>(center + margin);
    // One search for both keys, until the middle of the interval lies between them.
    Interval both = {all.low, all.high, sample, 0};
    for (Interval next = both; both.high - both.low >= kNarrow; both = next) {
      const int64_t count = narrow(sample, next, both.middle() & ~(unit() - 1), lower);
      if (upper <= count && count < lower) break;
    }
    Range bracket = all;
    if (upper > 0) bracket.high = search(sample, both, upper).key;
    if (lower < sample) bracket.low = search(sample, both, lower).key;
    return bracket;
  }

  const KeyKernels& kernels_;
  const ScoreRow& row_;
  uint32_t* bins_;
  uint32_t* keys_;
};

}  // namespace

int64_t pivot_scratch(int64_t longest) {
  return bin_words(longest) + longest + kSlack;
}

Pivot find_pivot(const RowKernels& kernels, const ScoreRow& row, int64_t rank, uint32_t* scratch) {
  return PivotSearch(kernels, row, scratch).find(rank);
}

}  // namespace lkv::cpu
