#pragma once

#include <cstring>
#include <type_traits>

#include "block_scan.cuh"
#include "lkv/segments.h"

// How attention is cut: a unit is one tile of queries of a segment over one piece of its rows, for one slice of the
// columns of V. Query i of a segment is head i % group of the group at token i / group: neighbours see about the same
// rows.

namespace lkv::cuda {

inline constexpr int kQueries = 8;   // of a tile, which share every read of K and V
inline constexpr int kChunk = 64;    // columns that are staged at once
inline constexpr int kResident = 2;  // chunks of the queries that are kept, if that is all of them
inline constexpr int kChunksPerSlice = 2;
inline constexpr int kSlice = kChunk * kChunksPerSlice;            // columns of V that a block has registers for
inline constexpr int kQuad = 4;                                    // rows or columns that a thread takes at once
inline constexpr int kPair = 2;                                    // queries that a thread multiplies V with
inline constexpr int kTeam = kChunk / kQuad * (kQueries / kPair);  // threads that multiply a row of V

// What a unit found: acc is the sum over its rows of e^(logit - highest) V.
struct AttendPartial {
  float highest[kQueries], sum[kQueries], acc[kQueries][kSlice];
};

struct AttendPlan {
  int64_t tiles, slices, pieces;
  int64_t piece_rows;
  AttendPartial* partials;  // [unit]; not used when there is one piece

  LKV_HD int64_t unit(int64_t row, int64_t piece, int64_t tile, int64_t slice) const {
    return ((row * pieces + piece) * tiles + tile) * slices + slice;
  }
  // How many pieces of a segment have a result: at least one, as a query that sees nothing gets zeros.
  LKV_HD int64_t pieces_of(int64_t length) const { return clamp((length + piece_rows - 1) / piece_rows, 1, pieces); }
};

// `type`: of the tile, that of K and V; float32 where types are mixed.
template <ScoreType type, int kBlock>
struct AttendShared {
  using Item = typename ScoreTraits<type>::Bits;
  static constexpr int kPitch = kChunk + 16 / sizeof(Item);  // rows of a tile begin in different banks

  union {
    Item tile[kBlock][kPitch];                     // of K or V: as many rows as threads
    float sums[kBlock / kTeam][kQueries][kSlice];  // at the end: acc of each team
  };
  float queries[kResident][kQueries][kChunk];  // scaled
  float weights[kQueries][kBlock + kQuad];     // of the rows of the tile; logits first
  float highest[kQueries], sum[kQueries], factor[kQueries], sink[kQueries];
  const char* query[kQueries];  // nullptr: there is none
  char* out[kQueries];
  int end[kQueries];  // rows of the segment that the query sees
};

// The head of a query of a segment.
__device__ __forceinline__ int64_t query_head(const AttendParams& p, int64_t row, int64_t i) {
  return row % p.heads * p.group + i % p.group;
}

// Where a query of a segment, or its result, lies.
__device__ __forceinline__ char* query_at(const AttendParams& p, const Strided& t, int64_t row, int64_t i) {
  return t.data + row / p.heads * t.batch + query_head(p, row, i) * t.head + i / p.group * t.token;
}

template <ScoreType type>
__device__ __forceinline__ float load_float(const void* items, int64_t i) {
  return to_float<type>(static_cast<const typename ScoreTraits<type>::Bits*>(items)[i]);
}

// f of a type that is known when it runs.
template <class F>
__device__ __forceinline__ auto of_type(ScoreType type, F&& f) {
  switch (type) {
    case ScoreType::f32:
      return f.template operator()<ScoreType::f32>();
    case ScoreType::f16:
      return f.template operator()<ScoreType::f16>();
    default:
      return f.template operator()<ScoreType::bf16>();
  }
}

__device__ __forceinline__ float load_float(ScoreType type, const void* items, int64_t i) {
  return of_type(type, [&]<ScoreType t>() { return load_float<t>(items, i); });
}

__device__ __forceinline__ void store_float(ScoreType type, void* items, int64_t i, float value) {
  of_type(type, [&]<ScoreType t>() { static_cast<typename ScoreTraits<t>::Bits*>(items)[i] = from_float<t>(value); });
}

// kCount floats from as many items at an aligned address.
template <ScoreType type, int kCount>
__device__ __forceinline__ void load_floats(const void* from, float (&to)[kCount]) {
  using Item = typename ScoreTraits<type>::Bits;
  using Vectors = std::conditional_t<kCount * sizeof(Item) == sizeof(uint4), uint4, uint2>;
  using Vector = std::conditional_t<kCount == 1, Item, Vectors>;
  static_assert(sizeof(Vector) == kCount * sizeof(Item));
  const Vector vector = *static_cast<const Vector*>(from);
  Item items[kCount];
  memcpy(items, &vector, sizeof vector);
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = to_float<type>(items[i]);
}

}  // namespace lkv::cuda
