#pragma once

#include "block_scan.cuh"
#include "lkv/segments.h"
#include "select_sizes.h"

// How a segment is cut into slices, one for each warp, and the keys of a slice.

namespace lkv::cuda {

// What is selected of a segment, for one block.
struct RowPlan : Selection {
  uint32_t lead;  // keys between the vector of four that the first score lies in and that score
};

__device__ inline RowPlan plan_row(const SelectParams& p, int64_t row) {
  RowPlan plan = {selection_of(p, row), 0};
  plan.lead = reinterpret_cast<uintptr_t>(plan.scores) >> (p.type == ScoreType::f32 ? 2 : 1) & 3;
  return plan;
}

// One thread plans for the block, in shared memory.
__device__ __forceinline__ const RowPlan& share_plan(RowPlan* shared, const SelectParams& p, int64_t row) {
  if (threadIdx.x == 0) *shared = plan_row(p, row);
  block_sync();
  return *shared;
}

// The part of one warp, see keys_per_warp: `size` keys from key `begin` on, of which those in front of key 0 (where
// `begin` wraps) and from `end` on are none.
struct Slice {
  uint32_t begin, size, end;
};

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

// The keys of a warp's slice, tile by tile: four consecutive keys for every lane. first() reads the scores; each() goes
// over the keys again, from registers or shared memory as far as they were kept there. Both call f(i, keys) with the
// whole warp for every tile that begins in the slice; keys at or behind the end of the slice are not valid.
struct Four {
  uint32_t key[4];
};

// f(key) for those of the keys i .. i + 3 that lie before `end`.
template <class F>
__device__ __forceinline__ void each_valid(uint32_t i, uint32_t end, const Four& four, F&& f) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (i + k < end) f(four.key[k]);
  }
}

template <ScoreType type>
struct Scores {
  using Bits = typename ScoreTraits<type>::Bits;
  using Vector = std::conditional_t<sizeof(Bits) == 4, uint4, uint2>;
  struct Raw {
    Bits bits[4];
  };

  const char* data;
  int64_t stride;
  bool wide;  // four scores are one aligned vector

  __device__ Scores(const RowPlan& plan, const Slice& slice)
      : data(plan.scores),
        stride(plan.stride),
        wide(stride == sizeof(Bits) &&
             (reinterpret_cast<uintptr_t>(data) + slice.begin * sizeof(Bits)) % sizeof(Vector) == 0) {}

  __device__ __forceinline__ Raw load(uint32_t i, uint32_t end) const {
    Raw raw = {};
    if (wide && i < end && i + 3 < end) {  // key -1 is behind the end
      const Vector v = *reinterpret_cast<const Vector*>(data + int64_t{i} * sizeof(Bits));
      if constexpr (sizeof(Bits) == 4) {
        raw = {v.x, v.y, v.z, v.w};
      } else {
        raw = {static_cast<Bits>(v.x), static_cast<Bits>(v.x >> 16), static_cast<Bits>(v.y),
               static_cast<Bits>(v.y >> 16)};
      }
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (i + k < end) raw.bits[k] = *reinterpret_cast<const Bits*>(data + int64_t{i + k} * stride);
      }
    }
    return raw;
  }

  __device__ __forceinline__ static Four keys(const Raw& raw) {
    return {ordered_key<type>(raw.bits[0]), ordered_key<type>(raw.bits[1]), ordered_key<type>(raw.bits[2]),
            ordered_key<type>(raw.bits[3])};
  }
};

// Read each time.
template <ScoreType type>
struct StreamedKeys {
  static constexpr uint32_t kAhead = 2;  // tiles loaded before the first is used
  Scores<type> scores;

  template <class F>
  __device__ __forceinline__ void from(uint32_t begin, const Slice& slice, F&& f) const {
    for (uint32_t tile = begin; tile < slice.size; tile += kAhead * kWarpTile) {
      const uint32_t i = slice.begin + tile + 4 * lane_id();
      typename Scores<type>::Raw raw[kAhead];
#pragma unroll
      for (uint32_t t = 0; t < kAhead; ++t) raw[t] = scores.load(i + t * kWarpTile, slice.end);
#pragma unroll
      for (uint32_t t = 0; t < kAhead; ++t) {
        if (tile + t * kWarpTile < slice.size) f(i + t * kWarpTile, Scores<type>::keys(raw[t]));
      }
    }
  }

  template <class F>
  __device__ __forceinline__ void first(const Slice& slice, F&& f) const {
    from(0, slice, f);
  }

  template <class F>
  __device__ __forceinline__ void each(const Slice& slice, F&& f) const {
    from(0, slice, f);
  }
};

// As many as fit stay in shared memory.
template <ScoreType type>
struct SharedKeys {
  StreamedKeys<type> source;
  uint32_t* kept;     // of this warp
  uint32_t capacity;  // keys, whole tiles

  __device__ __forceinline__ uint4& at(uint32_t key) const { return *reinterpret_cast<uint4*>(kept + key); }

  template <class F>
  __device__ __forceinline__ void first(const Slice& slice, F&& f) const {
    source.from(0, slice, [&](uint32_t i, const Four& four) {
      if (i - slice.begin < capacity) at(i - slice.begin) = {four.key[0], four.key[1], four.key[2], four.key[3]};
      f(i, four);
    });
  }

  template <class F>
  __device__ __forceinline__ void each(const Slice& slice, F&& f) const {
    for (uint32_t tile = 0; tile < slice.size && tile < capacity; tile += kWarpTile) {
      const uint4 keys = at(tile + 4 * lane_id());
      f(slice.begin + tile + 4 * lane_id(), Four{keys.x, keys.y, keys.z, keys.w});
    }
    source.from(capacity, slice, f);
  }
};

// The first kTiles stay in registers.
template <ScoreType type, int kTiles>
struct RegisterKeys {
  StreamedKeys<type> source;
  Four kept[kTiles];

  template <class F>
  __device__ __forceinline__ void first(const Slice& slice, F&& f) {
    typename Scores<type>::Raw raw[kTiles];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      raw[t] = source.scores.load(slice.begin + t * kWarpTile + 4 * lane_id(), slice.end);
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) kept[t] = Scores<type>::keys(raw[t]);
    each(slice, f);
  }

  template <class F>
  __device__ __forceinline__ void each(const Slice& slice, F&& f) const {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (t * kWarpTile < slice.size) f(slice.begin + t * kWarpTile + 4 * lane_id(), kept[t]);
    }
    source.from(kTiles * kWarpTile, slice, f);
  }
};

}  // namespace lkv::cuda
