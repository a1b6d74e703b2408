#pragma once

#include "block_scan.cuh"
#include "lkv/params.h"

// One segment of a select: what competes in it, and how it is cut into slices.

namespace lkv::cuda {

// Kept are the first `sink` and last `window` valid tokens and the `wanted` best of the `count` tokens between.
struct RowPlan {
  int64_t begin, length;  // valid positions
  int64_t out, span;      // where the span lies in the output
  int64_t keep, sink, window;
  const char* scores;  // of the first token that competes
  int64_t stride;
  uint32_t count, wanted;
  uint32_t lead;  // keys between the vector of four that the first score lies in and that score

  __device__ bool decided() const { return wanted == 0 || wanted == count; }
};

__device__ inline RowPlan plan_row(const SelectParams& p, int64_t row) {
  // Loaded first, so that none of these waits for another.
  const int64_t out = p.cu_seqlens[row], end = p.cu_seqlens[row + 1], keep = p.lengths[row];
  const Strided scores = p.scores[p.source.layer_of(row)];
  const Segment segment = segment_of(p.source, row);
  RowPlan plan;
  plan.begin = segment.begin;
  plan.length = segment.length;
  plan.out = clamp(out, 0, p.total);
  plan.span = clamp(end, plan.out, p.total) - plan.out;
  plan.keep = clamp(keep, 0, segment.length < plan.span ? segment.length : plan.span);
  plan.sink = clamp(p.sink, 0, plan.keep);
  plan.window = clamp(p.window, 0, plan.keep - plan.sink);
  plan.count = static_cast<uint32_t>(segment.length - plan.sink - plan.window);
  plan.wanted = static_cast<uint32_t>(plan.keep - plan.sink - plan.window);
  plan.scores = segment.at(scores, segment.begin + plan.sink);
  plan.stride = scores.token;
  plan.lead = reinterpret_cast<uintptr_t>(plan.scores) >> (p.type == ScoreType::f32 ? 2 : 1) & 3;
  return plan;
}

// One thread plans for the block, in shared memory.
__device__ __forceinline__ const RowPlan& share_plan(RowPlan* shared, const SelectParams& p, int64_t row) {
  if (threadIdx.x == 0) *shared = plan_row(p, row);
  block_sync();
  return *shared;
}

// Of the tokens that compete, in order, every block of a segment takes one run and every warp of it one part of that,
// so that ranks follow from how many keys the slices before keep. Parts are whole warp tiles.
inline constexpr uint32_t kWarpTile = 4 * kWarp;

// The part of one warp: `size` keys from key `begin` on, of which those in front of key 0 (where `begin` wraps) and
// from `end` on are none.
struct Slice {
  uint32_t begin, size, end;
};

LKV_HD uint32_t keys_per_warp(uint32_t count, uint32_t warps) {
  return ((count + warps - 1) / warps + kWarpTile - 1) / kWarpTile * kWarpTile;
}

// Slices begin at addresses of whole vectors of scores, up to three keys in front of the first, where parts do not grow
// by that.
template <int kBlock>
__device__ __forceinline__ Slice slice_of(const RowPlan& plan, uint32_t block, uint32_t blocks) {
  constexpr uint32_t warps = kBlock / kWarp;
  const uint32_t part = keys_per_warp(plan.count, blocks * warps);
  const bool fits = keys_per_warp(plan.count + plan.lead, blocks * warps) == part;
  const uint32_t lead = fits ? plan.lead : 0, count = plan.count + lead;
  const auto upto = [&](uint64_t parts) { return static_cast<uint32_t>(parts * part < count ? parts * part : count); };
  const uint32_t begin = upto(uint64_t{block} * warps + warp_id());
  const uint32_t end = upto(uint64_t{block} * warps + warp_id() + 1);
  return {begin - lead, end - begin, end - lead};
}

}  // namespace lkv::cuda
