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
    uint32_t sum = 0, total;
#pragma unroll 2
    for (int i = 4; i <= kOwn; i += 4) {
      const uint4 counts = four(top - i);
      sum += counts.x + counts.y + counts.z + counts.w;
    }
    uint32_t above = scan.exclusive(sum, total);
    if (above < pivot.need && pivot.need <= above + sum) {
      const uint32_t shift = round_shift(round);
      for (uint32_t bin = top; bin > top - kOwn && above < pivot.need;) {
        const uint4 counts = four(bin -= 4);
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

}  // namespace lkv::cuda
