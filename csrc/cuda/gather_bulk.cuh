#pragma once

#include "gather_tile.cuh"

// A gather whose rows never touch a register: every warp brings the rows of one payload of a tile to shared memory by
// bulk copies, rows that lie next to each other by one, and stores them by another.

namespace lkv::cuda {

inline constexpr uint32_t kStageBytes = 16 << 10;  // per warp
inline constexpr int kBulkBlock = kTileRows;       // a warp for K and one for V

struct BulkShared {
  alignas(16) char stage[kBulkBlock / kWarp][kStageBytes];
  TileShared tile;
  ArrivalBarrier arrivals[kBulkBlock / kWarp];
};

// Copies rows [0, rows) that lie at source[i] (nullptr: zeros) by one warp. `phases`: how often its barrier was used.
__device__ __forceinline__ void bulk_copy(const char* const* source, char* out, uint32_t row_bytes, int rows,
                                          BulkShared* shared, uint32_t& phases) {
  char* stage = shared->stage[warp_id()];
  ArrivalBarrier* arrivals = &shared->arrivals[warp_id()];
  const int per_stage = static_cast<int>(kStageBytes / row_bytes);
  for (int first = 0; first < rows; first += per_stage) {
    const int end = rows - first < per_stage ? rows : first + per_stage;
    uint32_t expected = 0;
    for (int i = first + lane_id(); i < end; i += kWarp) expected += source[i] != nullptr ? row_bytes : 0;
    arrive_expecting(arrivals, expected);
    for (int i = first + lane_id(); i < end; i += kWarp) {
      char* place = stage + (i - first) * row_bytes;
      if (source[i] == nullptr) {
        for (uint32_t b = 0; b < row_bytes; b += sizeof(uint4)) *reinterpret_cast<uint4*>(place + b) = {};
      } else if (i == first || source[i - 1] == nullptr || source[i] != source[i - 1] + row_bytes) {
        int next = i + 1;
        while (next < end && source[next] == source[next - 1] + row_bytes) ++next;
        bulk_load(place, source[i], static_cast<uint32_t>(next - i) * row_bytes, arrivals);
      }
    }
    wait_arrivals(arrivals, phases++ & 1);
    fence_bulk();
    __syncwarp();
    if (lane_id() == 0) {
      bulk_store(out + int64_t{first} * row_bytes, stage, static_cast<uint32_t>(end - first) * row_bytes);
      wait_bulk_stores();
    }
    __syncwarp();
  }
}

__global__ void __launch_bounds__(kBulkBlock, kResidentThreads / kBulkBlock)
    gather_bulk_kernel(const LKV_GRID_CONSTANT GatherParams p) {
  auto* shared = dyn_smem<BulkShared>();
  if (lane_id() == 0) make_barrier(&shared->arrivals[warp_id()], kWarp);
  uint32_t phases = 0;
  for (int64_t first = int64_t{blockIdx.x} * kTileRows; first < p.total; first += int64_t{gridDim.x} * kTileRows) {
    const int rows = static_cast<int>(p.total - first < kTileRows ? p.total - first : kTileRows);
    for (int payload = 0; payload < p.payloads; payload += kPayloadGroup) {
      const int group = group_size(p, payload);
      stage_tile(
          p, first, payload, group, &shared->tile, [&](int i) { return find_row(p, first, i); },
          [&](int64_t row) { wait_for_select(p, row); });
      for (int g = warp_id(); g < group; g += kBulkBlock / kWarp) {
        const int64_t row_bytes = shared->tile.row_bytes[g];
        char* out = shared->tile.out[g];
        const char* const* source = shared->tile.source[g];
        const uint32_t bits = tile_bits(&shared->tile, g);
        if (bits % sizeof(uint4) == 0 && row_bytes > 0 && row_bytes <= kStageBytes) {
          bulk_copy(source, out, static_cast<uint32_t>(row_bytes), rows, shared, phases);
        } else {
          with_vector(bits, [&](auto vector) {
            copy_rows<decltype(vector), kWarp>([&](int row) { return source[row]; },
                                               [&](int row) { return out + row * row_bytes; }, row_bytes, rows,
                                               lane_id());
          });
        }
      }
      block_sync();
    }
  }
  grid_dependency_wait();  // see gather_kernel
}

}  // namespace lkv::cuda
