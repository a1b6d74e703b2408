#pragma once

#include "attend_shared.cuh"
#include "rows_copy.cuh"

// The steps of a unit over one tile of rows, by all threads of a block.

namespace lkv::cuda {

inline constexpr float kNever = -INFINITY;

// A lane copies one column of vectors of kItems items.
template <ScoreType source, int kItems, ScoreType type, int kBlock>
__device__ __forceinline__ void stage_items(AttendShared<type, kBlock>* shared, const char* from, int64_t stride,
                                            int rows, int columns) {
  using Item = typename ScoreTraits<type>::Bits;
  using Vector = std::conditional_t<kItems == 1, Item, uint4>;
  constexpr int kSize = sizeof(typename ScoreTraits<source>::Bits), kLanes = kChunk / kItems, kStep = kBlock / kLanes;
  const int column = threadIdx.x % kLanes * kItems;
  if (column >= columns) return;
  int row = threadIdx.x / kLanes;
  from += row * stride + column * kSize;
#pragma unroll kInFlight
  for (; row < rows; row += kStep, from += kStep * stride) {
    auto* to = reinterpret_cast<Vector*>(&shared->tile[row][column]);
    if constexpr (source == type) {
      *to = *reinterpret_cast<const Vector*>(from);
    } else {
      float floats[kItems];
      load_floats<source>(from, floats);
      memcpy(to, floats, sizeof floats);
    }
  }
}

// Rows and columns of K or V become the tile, columns filled up with zeros to a whole vector.
template <ScoreType source, ScoreType type, int kBlock>
__device__ __forceinline__ void stage_rows(AttendShared<type, kBlock>* shared, const char* from, int64_t stride,
                                           int rows, int columns) {
  constexpr int kItems = sizeof(uint4) / sizeof(typename ScoreTraits<type>::Bits);
  constexpr int kSize = sizeof(typename ScoreTraits<source>::Bits);
  block_sync();  // all threads have read the last tile
  if ((low_bits(from) | static_cast<uint32_t>(stride | columns * kSize)) % (kItems * kSize) == 0) {
    stage_items<source, kItems>(shared, from, stride, rows, columns);
  } else {
    stage_items<source, 1>(shared, from, stride, rows, columns);
    if (static_cast<int>(threadIdx.x) < rows) {
      for (int column = columns; column % kItems != 0; ++column) shared->tile[threadIdx.x][column] = 0;
    }
  }
}

// The columns from `at` on of rows of `source`, which is `type` unless they are mixed.
template <bool kMixed, ScoreType type, int kBlock>
__device__ __forceinline__ void stage_rows(AttendShared<type, kBlock>* shared, ScoreType source, const char* from,
                                           int64_t stride, int64_t at, int rows, int columns) {
  const auto stage = [&]<ScoreType t>() {
    stage_rows<t>(shared, from + at * static_cast<int64_t>(sizeof(typename ScoreTraits<t>::Bits)), stride, rows,
                  columns);
  };
  if constexpr (kMixed) {
    of_type(source, stage);
  } else {
    stage.template operator()<type>();
  }
}

// Columns [first, first + kChunk) of the queries, zeros behind the last.
template <ScoreType type, int kBlock>
__device__ __forceinline__ void stage_queries(AttendShared<type, kBlock>* shared, ScoreType source,
                                              const AttendParams& p, int64_t first, int slot) {
  for (int i = threadIdx.x; i < kQueries * kChunk; i += kBlock) {
    const int q = i / kChunk, column = i % kChunk;
    const bool inside = shared->query[q] != nullptr && first + column < p.dim;
    shared->queries[slot][q][column] = inside ? load_float(source, shared->query[q], first + column) * p.scale : 0.0f;
  }
}

// A thread's row times every query, over the staged columns.
template <ScoreType type, int kBlock>
__device__ __forceinline__ void add_dots(const AttendShared<type, kBlock>* shared, int slot, int columns,
                                         float (&logits)[kQueries]) {
  constexpr int kItems = sizeof(uint4) / sizeof(typename ScoreTraits<type>::Bits);
#pragma unroll 1  // registers for another block are worth more
  for (int at = 0; at < columns; at += kItems) {
    float key[kItems];
    load_floats<type>(&shared->tile[threadIdx.x][at], key);
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
#pragma unroll
      for (int part = 0; part < kItems; part += kQuad) {
        float query[kQuad];
        load_floats<ScoreType::f32>(&shared->queries[slot][q][at + part], query);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) logits[q] = fmaf(query[i], key[part + i], logits[q]);
      }
    }
  }
}

template <class F>
__device__ __forceinline__ float warp_reduce(float x, F&& f) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = f(x, __shfl_sync(kFullWarp, x, lane_id() ^ step));
  return x;
}

// The running softmax of the queries of one warp, the same in all of its lanes.
template <int kBlock>
struct Softmax {
  static constexpr int kWarps = kBlock / kWarp, kMine = kQueries / kWarps;
  static_assert(kQueries % kWarps == 0);
  float highest[kMine], sum[kMine];

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      highest[i] = kNever;
      sum[i] = 0;
    }
  }

  // One more row of value zero, for query i of this warp; returns what its sums are multiplied with.
  __device__ __forceinline__ float add_row(int i, float logit) {
    const float before = highest[i];
    highest[i] = fmaxf(before, logit);
    const float factor = highest[i] == before ? 1.0f : expf(before - highest[i]);
    sum[i] = sum[i] * factor + (highest[i] == logit ? 1.0f : expf(logit - highest[i]));
    return factor;
  }

  // Logits of the tile that begins at row `first` become weights relative to the highest logit so far, and `factor`
  // what sums relative to the highest before must be multiplied with. NaN is never the highest, but stays in the sum.
  template <ScoreType type>
  __device__ __forceinline__ void add(AttendShared<type, kBlock>* shared, int first) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int q = warp_id() + i * kWarps;
      const int seen = shared->end[q] - first;
      float* weights = shared->weights[q];
      float logits[kWarps], top = kNever;
#pragma unroll
      for (int k = 0; k < kWarps; ++k) {
        const int row = lane_id() + k * kWarp;
        logits[k] = row < seen ? weights[row] : kNever;
        top = fmaxf(top, logits[k]);
      }
      const float before = highest[i];
      highest[i] = fmaxf(before, warp_reduce(top, [](float a, float b) { return fmaxf(a, b); }));
      const float base = highest[i] == kNever ? 0.0f : highest[i];
      float added = 0;
#pragma unroll
      for (int k = 0; k < kWarps; ++k) {
        const float weight = expf(logits[k] - base);
        weights[lane_id() + k * kWarp] = weight;
        added += weight;
      }
      const float factor = highest[i] == before ? 1.0f : expf(before - base);
      sum[i] = sum[i] * factor + warp_reduce(added, [](float a, float b) { return a + b; });
      if (lane_id() == 0) shared->factor[q] = factor;
    }
  }
};

// What a thread sums of V: two queries times four columns of every chunk, over the quads of rows that its team takes.
struct Accumulators {
  float acc[kChunksPerSlice][kPair][kQuad];

  __device__ __forceinline__ static int column() { return threadIdx.x % (kChunk / kQuad) * kQuad; }
  __device__ __forceinline__ static int query() { return threadIdx.x % kTeam / (kChunk / kQuad) * kPair; }
  __device__ __forceinline__ static int team() { return threadIdx.x / kTeam; }

  __device__ __forceinline__ void scale(const float* factors) {
#pragma unroll
    for (int i = 0; i < kPair; ++i) {
      const float factor = factors[query() + i];
#pragma unroll
      for (int chunk = 0; chunk < kChunksPerSlice; ++chunk) {
#pragma unroll
        for (int c = 0; c < kQuad; ++c) acc[chunk][i][c] *= factor;
      }
    }
  }

  // The tile has `rows` rows of a chunk of V. A row of weight 0 adds nothing, even if it holds NaN: rows that a query
  // does not see, and what lies behind the last row in the tile.
  template <ScoreType type, int kBlock>
  __device__ __forceinline__ void add(const AttendShared<type, kBlock>* shared, int chunk, int rows) {
    for (int row = team() * kQuad; row < rows; row += kBlock / kTeam * kQuad) {
      float weights[kPair][kQuad];
#pragma unroll
      for (int i = 0; i < kPair; ++i) load_floats<ScoreType::f32>(&shared->weights[query() + i][row], weights[i]);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        float value[kQuad];
        load_floats<type>(&shared->tile[row + j][column()], value);
#pragma unroll
        for (int i = 0; i < kPair; ++i) {
          if (weights[i][j] == 0.0f) continue;
#pragma unroll
          for (int c = 0; c < kQuad; ++c) acc[chunk][i][c] = fmaf(weights[i][j], value[c], acc[chunk][i][c]);
        }
      }
    }
  }
};

}  // namespace lkv::cuda
