#pragma once

#include "find_row.cuh"
#include "rows_copy.cuh"

// Eviction in place in any order: kept rows that lie where kept rows go stay, the others fill the holes between them
// (filler_of). What moves lies where nothing goes, so blocks need not know of each other. The slots of all segments, as
// the positions of the kept rows list them, are cut into tiles of one for each thread, and a unit of work is one
// payload of one tile. A block
//   1. finds, a thread for each slot, the row that belongs there: by bisection of the positions of its segment. The
//      unit of the first payload writes its position;
//   2. lists the rows that are not there yet, each warp behind a counter in shared memory, whichever comes first: half
//      of the rows stay where half of the cache is kept, and no lane is to idle for them;
//   3. copies them, several loads in flight before the first store.

namespace lkv::cuda {

// How many pages are free, by the threads of the whole grid.
template <int kBlock>
__device__ __forceinline__ void write_free_pages(const CompactParams& p) {
  for (int64_t payload = 0; p.pages != nullptr && payload < p.payloads; ++payload) {
    const Pages& pages = p.pages[payload];
    const int64_t tables = tables_of(p, pages);
    for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; i < tables; i += int64_t{gridDim.x} * kBlock) {
      pages.free[i] = static_cast<int32_t>(free_pages_of(p, pages, i));
    }
  }
}

// The first of the entries [low, high) of `positions` whose position is `slot` or more. Entries are counted in 32 bits.
__device__ __forceinline__ uint32_t find_position(const int32_t* positions, uint32_t low, uint32_t high, int32_t slot) {
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (positions[middle] < slot) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <int kBlock>
struct FillShared {
  const char* from[kBlock];
  char* to[kBlock];
  uint32_t bits[kBlock / kWarp];  // of the addresses of each warp, or-ed together
  uint32_t count;
};

// Where a row comes from and goes to; nullptr: it stays, or may not move.
struct Move {
  const char* from;
  char* to;
};

// Entry j of the positions, of segment `row` or of none (-1).
__device__ __forceinline__ Move find_filler(const CompactParams& p, int64_t row, uint32_t payload, int64_t j) {
  int32_t position = p.positions[j];
  Move move = {nullptr, nullptr};
  if (row >= 0) {
    const Segment segment = segment_of(p.source, row);
    Destination to = destination_of(p, segment, row);
    const int64_t begin = clamp(p.cu_seqlens[row], 0, j), i = j - begin;
    to.count = smaller(to.count, p.total - begin);
    if (i < to.count) {
      const int32_t* kept = p.positions + begin;
      const auto slot = static_cast<int32_t>(to.first + i);
      position = filler_of(kept, to, p.to_back, i, find_position(kept, 0, static_cast<uint32_t>(to.count), slot));
      if (payload < p.payloads && position != slot && position >= 0 && position < segment.limit) {
        const Strided& tokens = p.payload[payload * p.source.layers + segment.layer];
        move.from = row_at(pages_of(p, payload), segment, tokens, position);
        move.to = row_at(pages_of(p, payload), segment, tokens, slot);
      }
    }
  }
  if (payload == 0) p.filled[j] = position;
  return move;
}

// Appends what the lanes of a warp have to move. The order in the list is not always the same, and shows nowhere.
template <int kBlock>
__device__ __forceinline__ void list_moves(const Move& move, FillShared<kBlock>* shared) {
  const bool moves = move.from != nullptr && move.to != nullptr;
  const uint32_t listed = __ballot_sync(kFullWarp, moves);
  const uint32_t bits = __reduce_or_sync(kFullWarp, moves ? low_bits(move.from) | low_bits(move.to) : 0);
  uint32_t first = 0;
  if (lane_id() == 0) {
    shared->bits[warp_id()] = bits;
    first = atomicAdd(&shared->count, static_cast<uint32_t>(__popc(listed)));
  }
  first = __shfl_sync(kFullWarp, first, 0);
  if (!moves) return;
  const uint32_t at = first + __popc(listed & ((1u << lane_id()) - 1));
  shared->from[at] = move.from;
  shared->to[at] = move.to;
}

template <int kBlock>
__global__ void __launch_bounds__(kBlock, kResidentThreads / kBlock)
    fill_kernel(const LKV_GRID_CONSTANT CompactParams p) {
  auto* shared = dyn_smem<FillShared<kBlock>>();
  write_free_pages<kBlock>(p);
  const auto payloads = static_cast<uint32_t>(p.payloads > 0 ? p.payloads : 1);
  const int64_t units = (p.total + kBlock - 1) / kBlock * payloads;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int64_t tile = unit / payloads;
    const auto payload = static_cast<uint32_t>(unit - tile * payloads);
    if (threadIdx.x == 0) shared->count = 0;
    block_sync();  // the list is empty, and nobody copies what was in it
    const int64_t first = tile * kBlock, j = first + threadIdx.x;
    const int64_t row = find_row(p, first + warp_id() * kWarp, lane_id());
    list_moves<kBlock>(j < p.total ? find_filler(p, row, payload, j) : Move{nullptr, nullptr}, shared);
    block_sync();  // the list is complete
    const uint32_t count = shared->count;
    const int64_t row_bytes = payload < p.payloads ? p.row_bytes[payload] : 0;
    auto bits = static_cast<uint32_t>(row_bytes);
    for (const uint32_t more : shared->bits) bits |= more;
    with_vector(bits, [&](auto vector) {
      copy_rows<decltype(vector), kBlock>([&](uint32_t row) { return shared->from[row]; },
                                          [&](uint32_t row) { return shared->to[row]; }, row_bytes, count, threadIdx.x);
    });
    block_sync();  // before thread 0 empties it
  }
}

}  // namespace lkv::cuda
