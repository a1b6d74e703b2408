#pragma once

#include "lkv/params.h"
#include "rows_copy.cuh"

// A tile of output rows: found together, then copied payload by payload.

namespace lkv::cuda {

inline constexpr int kTileRows = 64;     // skewed budgets balance, as tiles know no row sets
inline constexpr int kPayloadGroup = 4;  // payloads whose addresses are found together

// Where the rows of one tile come from; nullptr: zeros.
struct TileShared {
  const char* source[kPayloadGroup][kTileRows];
  uint32_t address_bits[kPayloadGroup][kTileRows / kWarp];  // or-ed
};

// What an output row is.
struct TokenRow {
  RowSet set;
  int64_t position;  // -1: zeros
};

__device__ __forceinline__ TokenRow token_of(const GatherParams& p, int64_t row, int64_t j) {
  TokenRow token = {row_set(p.source, row), -1};
  const int64_t position = p.positions[j];
  if (position >= 0 && position < token.set.limit) token.position = position;
  return token;
}

// The row set whose room holds output row j, or -1. Any contents of cu_seqlens give a row set in range.
__device__ __forceinline__ int64_t row_of(const int32_t* cu_seqlens, int64_t rows, int64_t j) {
  int64_t low = 0, high = rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (cu_seqlens[middle + 1] > j) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low < rows && cu_seqlens[low] <= j ? low : -1;
}

// The last row set that begins at or before output row j, by a whole warp: of 1024 row sets in two loads that wait for
// each other, where row_of takes ten.
__device__ __forceinline__ int64_t warp_row_of(const int32_t* cu_seqlens, int64_t rows, int64_t j) {
  int64_t low = 0;
  for (int64_t size = rows; size > 1;) {
    const int64_t step = (size + kWarp - 1) / kWarp, probe = low + lane_id() * step;
    const bool begins = lane_id() * step < size && cu_seqlens[probe] <= j;
    const int before = __popc(__ballot_sync(kFullWarp, begins)) - 1;
    const int64_t skipped = before > 0 ? before * step : 0;
    low += skipped;
    size = size - skipped < step ? size - skipped : step;
  }
  return low;
}

// Row i of the tile that begins at output row `first`, by all lanes of a warp. Waits for the positions of its row set.
__device__ __forceinline__ TokenRow find_token(const GatherParams& p, int64_t first, int i) {
  const int64_t rows = p.source.rows(), j = first + i;
  int64_t row = rows > 0 ? warp_row_of(p.cu_seqlens, rows, first) : -1;
  if (row >= 0 && !(j < p.total && p.cu_seqlens[row] <= j && j < p.cu_seqlens[row + 1])) {
    row = j < p.total ? row_of(p.cu_seqlens, rows, j) : -1;
  }
  if (row < 0) return {{}, -1};
  if (p.ready != nullptr) {
    while (load_acquire(&p.ready[row]) == 0) spin_pause();
  }
  return token_of(p, row, j);
}

// The sources of the rows first .. first + kTileRows of some payloads; `token_at(i)` finds the i-th of the rows.
template <class TokenAt>
__device__ __forceinline__ void stage_tile(const GatherParams& p, int64_t payload, int payloads, TileShared* shared,
                                           TokenAt&& token_at) {
  for (int i = threadIdx.x; i < kTileRows; i += blockDim.x) {
    const TokenRow token = token_at(i);
    for (int g = 0; g < payloads; ++g) {
      const Strided& input = p.inputs[(payload + g) * p.source.layers + token.set.layer];
      const char* source = token.position < 0 ? nullptr : token.set.at(input, token.position);
      shared->source[g][i] = source;
      const uint32_t bits = __reduce_or_sync(kFullWarp, low_bits(source));
      if (lane_id() == 0) shared->address_bits[g][i / kWarp] = bits;
    }
  }
  block_sync();
}

// All bits of the addresses and sizes that one payload of a tile has.
__device__ __forceinline__ uint32_t tile_bits(const TileShared* shared, int g, const char* out, int64_t row_bytes) {
  uint32_t bits = low_bits(out) | static_cast<uint32_t>(row_bytes);
#pragma unroll
  for (int w = 0; w < kTileRows / kWarp; ++w) bits |= shared->address_bits[g][w];
  return bits;
}

// Rows first .. first + rows of every payload, two payloads at a time.
template <int kBlock, class TokenAt>
__device__ __forceinline__ void copy_tile(const GatherParams& p, int64_t first, int rows, TileShared* shared,
                                          TokenAt&& token_at) {
  constexpr int kTeam = kBlock / 2;
  for (int64_t payload = 0; payload < p.payloads; payload += kPayloadGroup) {
    const int group = static_cast<int>(p.payloads - payload < kPayloadGroup ? p.payloads - payload : kPayloadGroup);
    stage_tile(p, payload, group, shared, token_at);
    for (int g = threadIdx.x / kTeam; g < group; g += kBlock / kTeam) {
      const int64_t row_bytes = p.row_bytes[payload + g];
      char* out = p.outputs[payload + g] + first * row_bytes;
      const char* const* source = shared->source[g];
      with_vector(tile_bits(shared, g, out, row_bytes), [&](auto vector) {
        copy_rows<decltype(vector), kTeam>([&](int row) { return source[row]; }, out, row_bytes, rows,
                                           threadIdx.x % kTeam);
      });
    }
    block_sync();
  }
}

}  // namespace lkv::cuda
