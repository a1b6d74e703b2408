#pragma once

#include "lkv/segments.h"
#include "rows_copy.cuh"

// Gather by tiles of 64 rows of the output, whatever segments they belong to, so that skewed budgets balance. A tile:
//   1. Each thread finds the segment of one row, a warp at a time: two rounds of loads for up to 1024 segments.
//   2. It reads where the segment lies in each payload, by relaxed loads: the tables may be newer than the L1 cache.
//   3. It waits for the flag of the segment, which the select sets; one lane polls for all with the same segment.
//   4. It reads the position and puts the address of the source row into shared memory; nullptr stands for zeros.
//   5. The halves of the block copy two payloads at a time, rows spread over lanes by vectors of up to 16 bytes,
//      several loads in flight before the first store.

namespace lkv::cuda {

inline constexpr int kTileRows = 64;
inline constexpr int kPayloadGroup = 4;  // payloads whose addresses are found together

struct TileShared {
  const char* source[kPayloadGroup][kTileRows];             // nullptr: zeros
  int64_t step[kPayloadGroup][kTileRows];                   // from one position to the next
  uint32_t address_bits[kPayloadGroup][kTileRows / kWarp];  // of the sources, or-ed together
  char* out[kPayloadGroup];                                 // of the first row
  int64_t row_bytes[kPayloadGroup];
};

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

// The segment whose span holds output row j, or -1. Any contents of cu_seqlens give a segment in range.
__device__ __forceinline__ int64_t row_of(const int32_t* cu_seqlens, int64_t rows, int64_t j) {
  int64_t low = 0, high = rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (load_relaxed(&cu_seqlens[middle + 1]) > j) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low < rows && load_relaxed(&cu_seqlens[low]) <= j ? low : -1;
}

// The last segment that begins at or before output row j, by a whole warp: of 1024 segments in two loads that wait for
// each other, where row_of takes ten.
__device__ __forceinline__ int64_t warp_row_of(const int32_t* cu_seqlens, int64_t rows, int64_t j) {
  int64_t low = 0;
  for (int64_t size = rows; size > 1;) {
    const int64_t step = (size + kWarp - 1) / kWarp, probe = low + lane_id() * step;
    const bool begins = lane_id() * step < size && load_relaxed(&cu_seqlens[probe]) <= j;
    const int before = __popc(__ballot_sync(kFullWarp, begins)) - 1;
    const int64_t skipped = before > 0 ? before * step : 0;
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

// Waits for the positions of the lanes' segments. One lane polls for all with the same segment, as every acquire
// empties the L1 cache.
__device__ __forceinline__ void wait_for_select(const GatherParams& p, int64_t row) {
  if (p.ready == nullptr) return;
  const int64_t below = __shfl_up_sync(kFullWarp, row, 1);
  if (row >= 0 && (lane_id() == 0 || below != row)) {
    while (load_acquire(&p.ready[row]) == 0) spin_pause();
  }
  __syncwarp();
}

// The payloads of the group that begins with `payload`.
__device__ __forceinline__ int group_size(const GatherParams& p, int payload) {
  const int left = static_cast<int>(p.payloads) - payload;
  return left < kPayloadGroup ? left : kPayloadGroup;
}

// Where the rows first .. first + kTileRows of some payloads come from and go to. `row_at(i)`: the segment of the i-th
// of them, -1: zeros. Only the position of a row is read behind `wait(row)`.
template <class RowAt, class Wait>
__device__ __forceinline__ void stage_tile(const GatherParams& p, int64_t first, int payload, int payloads,
                                           TileShared* shared, RowAt&& row_at, Wait&& wait) {
  if (static_cast<int>(threadIdx.x) < payloads) {
    const int64_t row_bytes = load_relaxed(&p.row_bytes[payload + threadIdx.x]);
    shared->row_bytes[threadIdx.x] = row_bytes;
    shared->out[threadIdx.x] = load_relaxed(&p.outputs[payload + threadIdx.x]) + first * row_bytes;
  }
  for (int i = threadIdx.x; i < kTileRows; i += blockDim.x) {
    const int64_t row = row_at(i);
    const Segment segment = row < 0 ? Segment{} : segment_of(p.source, row, RelaxedLoad{});
#pragma unroll 2
    for (int g = 0; g < payloads && row >= 0; ++g) {
      const Strided input = load_relaxed(&p.inputs[int64_t{payload + g} * p.source.layers + segment.layer]);
      shared->source[g][i] = segment.at(input, 0);
      shared->step[g][i] = input.token;
    }
    wait(row);
    const int64_t position = row < 0 ? -1 : p.positions[first + i];
    const bool there = position >= 0 && position < segment.limit;
    for (int g = 0; g < payloads; ++g) {
      const char* source = there ? shared->source[g][i] + position * shared->step[g][i] : nullptr;
      shared->source[g][i] = source;
      const uint32_t bits = __reduce_or_sync(kFullWarp, low_bits(source));
      if (lane_id() == 0) shared->address_bits[g][i / kWarp] = bits;
    }
  }
  block_sync();
}

// All bits of the addresses and sizes that one payload of a tile has.
__device__ __forceinline__ uint32_t tile_bits(const TileShared* shared, int g) {
  uint32_t bits = low_bits(shared->out[g]) | static_cast<uint32_t>(shared->row_bytes[g]);
#pragma unroll
  for (int w = 0; w < kTileRows / kWarp; ++w) bits |= shared->address_bits[g][w];
  return bits;
}

// Rows first .. first + rows of every payload, two payloads at a time.
template <int kBlock, class RowAt, class Wait>
__device__ __forceinline__ void copy_tile(const GatherParams& p, int64_t first, int rows, TileShared* shared,
                                          RowAt&& row_at, Wait&& wait) {
  constexpr int kTeam = kBlock / 2;
  for (int payload = 0; payload < p.payloads; payload += kPayloadGroup) {
    const int group = group_size(p, payload);
    stage_tile(p, first, payload, group, shared, row_at, wait);
    for (int g = threadIdx.x / kTeam; g < group; g += kBlock / kTeam) {
      const char* const* source = shared->source[g];
      char* const out = shared->out[g];
      const int64_t row_bytes = shared->row_bytes[g];
      with_vector(tile_bits(shared, g), [&](auto vector) {
        copy_rows<decltype(vector), kTeam>([&](int row) { return source[row]; },
                                           [&](int row) { return out + row * row_bytes; }, row_bytes, rows,
                                           threadIdx.x % kTeam);
      });
    }
    block_sync();
  }
}

}  // namespace lkv::cuda
