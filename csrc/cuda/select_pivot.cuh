#pragma once

#include "select_keys.cuh"

// The radix search for the last key kept: 11, 11 and 10 bits a round (16-bit scores: two rounds). A round counts the
// keys that agree with the digits found so far by their next digit, and walks the counts from the top.

namespace lkv::cuda {

inline constexpr uint32_t kBins = 2048;

// Kept are the keys with (key >> shift) above `prefix` and the first `need` of those equal to it.
struct Pivot {
  uint32_t prefix, shift, need;
  bool exact;  // no more rounds: all that equal the prefix are kept, or they are ties
};

template <ScoreType type>
inline constexpr int kRounds = type == ScoreType::f32 ? 3 : 2;

LKV_HD uint32_t round_shift(int round) {
  return round == 0 ? 21 : round == 1 ? 10 : 0;
}

__device__ __forceinline__ Pivot first_pivot(uint32_t wanted) {
  return {0, 32, wanted, false};
}

__device__ __forceinline__ void clear_histogram(uint32_t* histogram) {
  for (uint32_t bin = threadIdx.x; bin < kBins; bin += blockDim.x) histogram[bin] = 0;
  block_sync();
}

// Adds the warp's slice to the block's histogram of round `round`.
template <class Keys>
__device__ __forceinline__ void count_digits(Keys& keys, const Slice& slice, const Pivot& pivot, int round,
                                             uint32_t* histogram) {
  const uint32_t shift = round_shift(round);
  if (round == 0) {
    keys.first(slice, [&](uint32_t i, const Four& four) {
      each_valid(i, slice.end, four, [&](uint32_t key) { atomicAdd(&histogram[key >> shift], 1u); });
    });
  } else {
    const uint32_t mask = (1u << (pivot.shift - shift)) - 1;
    keys.each(slice, [&](uint32_t i, const Four& four) {
      each_valid(i, slice.end, four, [&](uint32_t key) {
        if (key >> pivot.shift == pivot.prefix) atomicAdd(&histogram[key >> shift & mask], 1u);
      });
    });
  }
}

template <int kBlock>
struct PivotSearch {
  BlockScan<uint32_t, kBlock> scan;
  Pivot found;

  // The pivot one digit further, from the histogram over the whole segment; four(bin) loads the counts of bin .. bin
  // + 3. All threads call it and get it. Needs 1 <= need <= the sum of the bins; ends with a barrier, so the histogram
  // may be overwritten.
  template <class FourBins>
  __device__ __forceinline__ Pivot next(FourBins&& four, const Pivot& pivot, int round, int rounds) {
    constexpr int kOwn = kBins / kBlock;
    static_assert(kOwn % 4 == 0);
    const uint32_t top = kBins - threadIdx.x * kOwn;  // one past this thread's highest bin
    uint4 own[kOwn / 4];                              // the highest first
    uint32_t sum = 0, total;
#pragma unroll
    for (int i = 0; i < kOwn / 4; ++i) {
      own[i] = four(top - 4 * (i + 1));
      sum += own[i].x + own[i].y + own[i].z + own[i].w;
    }
    uint32_t above = scan.exclusive(sum, total);
    if (above < pivot.need && pivot.need <= above + sum) {
      const uint32_t shift = round_shift(round);
#pragma unroll
      for (int step = 0; step < kOwn / 4; ++step) {
        const uint4 counts = own[step];
        const uint32_t bin = top - 4 * (step + 1);
        const uint32_t count[4] = {counts.x, counts.y, counts.z, counts.w};
#pragma unroll
        for (int i = 3; i >= 0; --i) {
          if (above < pivot.need && pivot.need <= above + count[i]) {
            const uint32_t digit = bin + i, need = pivot.need - above;
            const uint32_t prefix = round == 0 ? digit : (pivot.prefix << (pivot.shift - shift)) | digit;
            found = {prefix, shift, need, round + 1 == rounds || need == count[i]};
          }
          above += count[i];
        }
      }
    }
    block_sync();
    return found;
  }
};

// Positions in ascending order, without a sort: the numbers of keys above and equal to the pivot before a slice say
// where the slice begins to write.

// Keys above the pivot in the upper half, keys equal to it in the lower: both add up in one 64-bit sum.
using Counts = uint64_t;
__device__ __forceinline__ uint32_t above(Counts counts) {
  return static_cast<uint32_t>(counts >> 32);
}
__device__ __forceinline__ uint32_t equal(Counts counts) {
  return static_cast<uint32_t>(counts);
}

// Over the lanes of a warp; neither half overflows, as rows are counted in 31 bits.
__device__ __forceinline__ Counts warp_sum(Counts mine) {
  return Counts{__reduce_add_sync(kFullWarp, above(mine))} << 32 | __reduce_add_sync(kFullWarp, equal(mine));
}

template <class Keys>
__device__ __forceinline__ Counts count_slice(const Keys& keys, const Slice& slice, const Pivot& pivot) {
  uint32_t greater = 0, ties = 0;
  keys.each(slice, [&](uint32_t i, const Four& four) {
    each_valid(i, slice.end, four, [&](uint32_t key) {
      greater += key >> pivot.shift > pivot.prefix;
      ties += key >> pivot.shift == pivot.prefix;
    });
  });
  return warp_sum(Counts{greater} << 32 | ties);
}

// Writes the kept positions of one warp's slice. `out` and `first` belong to key 0 of the segment.
template <class Keys>
__device__ __forceinline__ void emit_slice(const Keys& keys, const Slice& slice, const Pivot& pivot, Counts before,
                                           int64_t first, int32_t* out) {
  uint32_t greater_before = above(before), ties_before = equal(before);
  keys.each(slice, [&](uint32_t i, const Four& four) {
    uint32_t found = 0;  // greater in the upper 16 bits, ties in the lower: a tile has 128 keys
    each_valid(i, slice.end, four, [&](uint32_t key) {
      const uint32_t digits = key >> pivot.shift;
      found += digits > pivot.prefix ? 1u << 16 : digits == pivot.prefix ? 1u : 0u;
    });
    const uint32_t upto = warp_inclusive_sum(found);
    uint32_t greater = greater_before + ((upto - found) >> 16), ties = ties_before + ((upto - found) & 0xffff);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t digits = four.key[k] >> pivot.shift;
      const bool is_greater = i + k < slice.end && digits > pivot.prefix;
      const bool is_tie = i + k < slice.end && digits == pivot.prefix;
      if (is_greater || (is_tie && ties < pivot.need)) {
        out[greater + (ties < pivot.need ? ties : pivot.need)] = static_cast<int32_t>(first + i + k);
      }
      greater += is_greater;
      ties += is_tie;
    }
    const uint32_t tile_sum = __shfl_sync(kFullWarp, upto, kWarp - 1);
    greater_before += tile_sum >> 16;
    ties_before += tile_sum & 0xffff;
  });
}

// out[i] = first + i for i in [0, n), shared among `threads` threads.
__device__ __forceinline__ void emit_run(int32_t* out, int64_t n, int64_t first, int64_t thread, int64_t threads) {
  for (int64_t i = thread; i < n; i += threads) out[i] = static_cast<int32_t>(first + i);
}

__device__ __forceinline__ void emit_slack(int32_t* out, int64_t n, int64_t thread, int64_t threads) {
  for (int64_t i = thread; i < n; i += threads) out[i] = -1;
}

// All positions of a segment that need no scores: sink, window, the rows between if all of them stay, slack; and its
// share of the slack behind the last span.
__device__ __forceinline__ void emit_decided(const SelectParams& p, const RowPlan& plan, int64_t row, int64_t thread,
                                             int64_t threads) {
  int32_t* out = p.positions + plan.out;
  emit_run(out, plan.sink, plan.begin, thread, threads);
  emit_run(out + plan.keep - plan.window, plan.window, plan.begin + plan.length - plan.window, thread, threads);
  if (plan.decided()) emit_run(out + plan.sink, plan.wanted, plan.begin + plan.sink, thread, threads);
  emit_slack(out + plan.keep, plan.span - plan.keep, thread, threads);
  const int64_t rows = p.source.rows(), end = clamp(p.cu_seqlens[rows], 0, p.total);
  emit_slack(p.positions + end, p.total - end, row * threads + thread, rows * threads);
}

}  // namespace lkv::cuda
