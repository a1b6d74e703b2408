#pragma once

#include "block_scan.cuh"
#include "lkv/params.h"

// One row set of a select: what competes in it, and how it is cut into slices.

namespace lkv::cuda {

// Registers are bounded so that this many threads share a multiprocessor.
inline constexpr int kResidentThreads = 1024;

// Kept are the first `sink` and last `window` valid tokens and the `wanted` best of the `count` tokens between.
struct RowPlan {
  int64_t begin, length;  // valid positions
  int64_t out, room;      // where the room lies in the output
  int64_t keep, sink, window;
  const char* scores;  // of the first token that competes
  int64_t stride;
  uint32_t count, wanted;

  __device__ bool decided() const { return wanted == 0 || wanted == count; }
};

__device__ inline RowPlan plan_row(const SelectParams& p, int64_t row) {
  const RowSet set = row_set(p.source, row);
  RowPlan plan;
  plan.begin = set.begin;
  plan.length = set.length;
  plan.out = clamp(p.cu_seqlens[row], 0, p.total);
  plan.room = clamp(p.cu_seqlens[row + 1], plan.out, p.total) - plan.out;
  plan.keep = clamp(p.lengths[row], 0, set.length < plan.room ? set.length : plan.room);
  plan.sink = clamp(p.sink, 0, plan.keep);
  plan.window = clamp(p.window, 0, plan.keep - plan.sink);
  plan.count = static_cast<uint32_t>(set.length - plan.sink - plan.window);
  plan.wanted = static_cast<uint32_t>(plan.keep - plan.sink - plan.window);
  const Strided& scores = p.scores[set.layer];
  plan.scores = set.at(scores, set.begin + plan.sink);
  plan.stride = scores.token;
  return plan;
}

// One thread plans for the block, in shared memory.
__device__ __forceinline__ const RowPlan& share_plan(RowPlan* shared, const SelectParams& p, int64_t row) {
  if (threadIdx.x == 0) *shared = plan_row(p, row);
  block_sync();
  return *shared;
}

// Of the tokens that compete, in order, every block of a row set takes one run and every warp of it one part of that,
// so that ranks follow from how many keys the slices before keep. Parts are whole warp tiles.
inline constexpr uint32_t kWarpTile = 4 * kWarp;

struct Slice {
  uint32_t block_begin, block_keys;  // the keys a block may hold on chip, padding included
  uint32_t begin, end;               // of this warp
};

LKV_HD uint32_t keys_per_warp(uint32_t count, uint32_t warps) {
  return ((count + warps - 1) / warps + kWarpTile - 1) / kWarpTile * kWarpTile;
}

template <int kBlock>
__device__ __forceinline__ Slice slice_of(uint32_t count, uint32_t block, uint32_t blocks) {
  constexpr uint32_t warps = kBlock / kWarp;
  const uint32_t part = keys_per_warp(count, blocks * warps);
  const auto upto = [&](uint64_t parts) { return static_cast<uint32_t>(parts * part < count ? parts * part : count); };
  Slice slice;
  slice.block_begin = upto(uint64_t{block} * warps);
  slice.block_keys = part * warps;
  slice.begin = upto(uint64_t{block} * warps + warp_id());
  slice.end = upto(uint64_t{block} * warps + warp_id() + 1);
  return slice;
}

// The keys of a slice: read from the scores once and then from shared memory, or from the scores each time.
template <ScoreType type>
struct Keys {
  using Bits = typename ScoreTraits<type>::Bits;
  const char* scores;
  int64_t stride;
  uint32_t* on_chip;  // of the block's slice; nullptr: not kept
  uint32_t block_begin;

  __device__ __forceinline__ Bits bits(uint32_t i) const {
    return *reinterpret_cast<const Bits*>(scores + int64_t{i} * stride);
  }

  __device__ __forceinline__ uint32_t key(uint32_t i) const {
    return on_chip != nullptr ? on_chip[i - block_begin] : ordered_key<type>(bits(i));
  }

  // Keys i .. i + 3 as far as they lie before `end`. A warp's part begins at a multiple of 4 keys of the block.
  __device__ __forceinline__ uint4 four(uint32_t i, uint32_t end) const {
    if (on_chip != nullptr) return *reinterpret_cast<const uint4*>(on_chip + (i - block_begin));
    uint4 keys = {};
    if (i < end) keys.x = ordered_key<type>(bits(i));
    if (i + 1 < end) keys.y = ordered_key<type>(bits(i + 1));
    if (i + 2 < end) keys.z = ordered_key<type>(bits(i + 2));
    if (i + 3 < end) keys.w = ordered_key<type>(bits(i + 3));
    return keys;
  }

  // f(key) for every key of the warp's slice, reading the scores and keeping the keys if there is room.
  // Many loads are issued before the first is used.
  template <class F>
  __device__ __forceinline__ void read(const Slice& slice, F&& f) const {
    constexpr int kLoads = 8;
    for (uint32_t i = slice.begin + lane_id(); i < slice.end; i += kLoads * kWarp) {
      Bits loaded[kLoads];
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        if (i + k * kWarp < slice.end) loaded[k] = bits(i + k * kWarp);
      }
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        if (i + k * kWarp < slice.end) {
          const uint32_t key = ordered_key<type>(loaded[k]);
          if (on_chip != nullptr) on_chip[i + k * kWarp - block_begin] = key;
          f(key);
        }
      }
    }
  }

  template <class F>
  __device__ __forceinline__ void each(const Slice& slice, F&& f) const {
    if (on_chip == nullptr) return read(slice, f);
#pragma unroll 4
    for (uint32_t i = slice.begin + lane_id(); i < slice.end; i += kWarp) f(on_chip[i - block_begin]);
  }
};

}  // namespace lkv::cuda
