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

  // The pivot one digit further, from the histogram over the whole row set. All threads call it and get it.
  // Needs 1 <= need <= the sum of the bins; ends with a barrier, so the histogram may be overwritten.
  __device__ __forceinline__ Pivot next(const uint32_t* histogram, const Pivot& pivot, int round, int rounds) {
    constexpr int kOwn = kBins / kBlock;
    const uint32_t top = kBins - threadIdx.x * kOwn;  // one past this thread's highest bin
    uint32_t sum = 0, total;
#pragma unroll 4
    for (int i = 1; i <= kOwn; ++i) sum += histogram[top - i];
    uint32_t above = scan.exclusive(sum, total);
    if (above < pivot.need && pivot.need <= above + sum) {
      uint32_t bin = top - 1;
      while (above + histogram[bin] < pivot.need) above += histogram[bin--];
      const uint32_t shift = round_shift(round);
      const uint32_t prefix = round == 0 ? bin : (pivot.prefix << (pivot.shift - shift)) | bin;
      const uint32_t need = pivot.need - above;
      found = {prefix, shift, need, round + 1 == rounds || need == histogram[bin]};
    }
    block_sync();
    return found;
  }
};

}  // namespace lkv::cuda
