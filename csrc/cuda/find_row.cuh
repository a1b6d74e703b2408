#pragma once

#include "block_scan.cuh"
#include "lkv/segments.h"

// The segment that an output row belongs to, from the offsets of the spans.

namespace lkv::cuda {

// For offsets and tables, which the grid of the spans has written: a gather reads them before it waits for any grid.
struct RelaxedLoad {
  template <class T>
  LKV_HD T operator()(const T* p) const {
    return load_relaxed(p);
  }
};

__device__ __forceinline__ Strided load_relaxed(const Strided* p) {
  return {load_relaxed(&p->data), load_relaxed(&p->batch), load_relaxed(&p->head), load_relaxed(&p->token)};
}

// The segment whose span holds output row j, or -1. Any contents of cu_seqlens give a segment in range. Segments and
// rows are counted in 31 bits.
__device__ __forceinline__ int64_t row_of(const int32_t* cu_seqlens, int64_t rows, int64_t j) {
  uint32_t low = 0, high = static_cast<uint32_t>(rows);
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (load_relaxed(&cu_seqlens[middle + 1]) > j) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low < rows && load_relaxed(&cu_seqlens[low]) <= j ? int64_t{low} : -1;
}

// The last segment that begins at or before output row j, by a whole warp: of 1024 segments in two loads that wait for
// each other, where row_of takes ten.
__device__ __forceinline__ int64_t warp_row_of(const int32_t* cu_seqlens, int64_t rows, int64_t j) {
  uint32_t low = 0;
  for (auto size = static_cast<uint32_t>(rows); size > 1;) {
    const uint32_t step = (size + kWarp - 1) / kWarp, probe = lane_id() * step;
    const bool begins = probe < size && load_relaxed(&cu_seqlens[low + probe]) <= j;
    const int before = __popc(__ballot_sync(kFullWarp, begins)) - 1;
    const uint32_t skipped = before > 0 ? before * step : 0;
    low += skipped;
    size = size - skipped < step ? size - skipped : step;
  }
  return low;
}

// The segment of row i of the tile that begins at output row `first`, or -1. By all lanes of a warp.
template <class Params>
__device__ __forceinline__ int64_t find_row(const Params& p, int64_t first, int i) {
  const int64_t rows = p.source.rows(), j = first + i;
  const int64_t row = rows > 0 ? warp_row_of(p.cu_seqlens, rows, first) : -1;
  if (row < 0 || j >= p.total) return -1;
  const bool inside = load_relaxed(&p.cu_seqlens[row]) <= j && j < load_relaxed(&p.cu_seqlens[row + 1]);
  return inside ? row : row_of(p.cu_seqlens, rows, j);
}

}  // namespace lkv::cuda
