#pragma once

#include "select_pivot.cuh"

// Positions in ascending order, without a sort: how many keys above and equal to the pivot come before a slice is
// where the slice begins to write.

namespace lkv::cuda {

// Keys above the pivot in the upper half, keys equal to it in the lower: both add up in one 64-bit sum.
using Counts = uint64_t;
__device__ __forceinline__ uint32_t above(Counts counts) {
  return static_cast<uint32_t>(counts >> 32);
}
__device__ __forceinline__ uint32_t equal(Counts counts) {
  return static_cast<uint32_t>(counts);
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

// All positions of a segment that need no scores: sink, window, a middle kept whole, slack; and its share of what lies
// behind the last span.
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
