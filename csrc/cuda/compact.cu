#include "compact_fill.cuh"
#include "launch.h"
#include "tuning.h"

// Eviction in place: kept rows move to the front or to the back of their segment, which may lie in pages. In any order:
// compact_fill.cuh. In their order: the kept rows of all segments, as `positions` lists them, are cut into tiles, and a
// unit of work is one payload of one tile, so that a few long segments fill the device and skewed budgets balance. A
// block
//   1. draws the next ticket. Tickets name units in the order of the tiles, of which the last comes first where rows
//      move to the back;
//   2. stages, a thread for each row, where the row lies and where it goes;
//   3. loads a slice of the columns of its rows into registers;
//   4. publishes in the flag of its unit how far it has loaded;
//   5. waits, a thread for each row, for the flag of the unit whose row it is about to overwrite;
//   6. stores the slice, and goes on with the next one from step 3.
//
// No row is overwritten before it was read. Row i of a segment moves to slot `first + i`. Where that slot holds a kept
// row q of the segment, row q has the position first + i. Towards the front positions[i] >= i = positions[q], so q <= i
// as positions ascend; towards the back q >= i in the same way. Row q is loaded by the block's own unit before the
// barrier of step 5, or by another unit for whose flag the thread of row i waits.
//
// No block waits for ever, however few of the grid's blocks run at once. The unit of q has a lower ticket than that of
// i, as tickets follow the order in which q comes before i. Whoever draws a ticket runs already, so all units of lower
// tickets are done or in the hands of blocks that run. Of the units that are not done, the one of the lowest ticket
// waits for no other: every flag that it needs is of a unit that has loaded all of its slices. So it ends, and by
// induction all of them do. There is no barrier over the grid, and nothing here asks for blocks to be resident
// together.
//
// What is read through pointers may be anything: a search ends on a row of the segment that comes before i in that
// order, and on one of the rows that are cut into tiles, so what a block waits for always has a ticket, a lower one,
// and rows outside of the segment or the pool do not move.

namespace lkv::cuda {
namespace {

// Two blocks share a multiprocessor: one stages and waits while the other moves rows. Together they have 32 KB in
// flight, and more registers each than four would have.
constexpr int kProductionBlock = 256;
constexpr int kResident = 2;
constexpr uint32_t kSliceVectors = 16;  // vectors of a row that move in one slice

// Rows of a tile: as many as a block holds slices of in registers.
template <int kBlock>
constexpr uint32_t kRows = kBlock * kInFlight / kSliceVectors;

// The warps that stage them.
template <int kBlock>
constexpr int kWarps = static_cast<int>(kRows<kBlock> + kWarp - 1) / kWarp;

template <int kBlock>
struct CompactShared {
  const char* from[kRows<kBlock>];  // nullptr: the row does not move
  char* to[kRows<kBlock>];
  uint32_t bits[kWarps<kBlock>];  // of the addresses, or-ed together
  uint32_t ticket;
};

// In device memory, zero when the grid begins.
struct Progress {
  uint32_t* ticket;
  uint32_t* loaded;  // of each unit, tile-major: how many units of 16 bytes of its rows
};

// Bytes [0, end) of a row in units of 16 bytes. Slices end at whole units or with the row.
__device__ __forceinline__ uint32_t units_of(int64_t end) {
  return static_cast<uint32_t>((end + 15) / 16);
}

// Stages entry j of the `used` ones of `positions`, kept row j - begin of the segment whose entries are [begin, end),
// by thread i. Returns the flag of the unit that loads what lies where the row goes; nullptr: none but its own, or
// nobody.
template <int kBlock>
__device__ __forceinline__ const uint32_t* stage_row(const CompactParams& p, const Progress& progress, int64_t row,
                                                     uint32_t payload, uint32_t used, uint32_t j, int i,
                                                     CompactShared<kBlock>* shared) {
  shared->from[i] = nullptr;
  shared->to[i] = nullptr;
  if (row < 0) return nullptr;
  const Segment segment = segment_of(p.source, row);
  const Destination destination = destination_of(p, segment, row);
  const auto begin = static_cast<uint32_t>(clamp(p.cu_seqlens[row], 0, j));
  const auto end = static_cast<uint32_t>(begin + smaller(destination.count, int64_t{used} - begin));
  const int32_t slot = static_cast<int32_t>(destination.first) + static_cast<int32_t>(j - begin);
  const int32_t position = p.positions[j];
  if (j >= end || position == slot || position < 0 || position >= segment.limit) return nullptr;
  const Strided& tokens = p.payload[payload * p.source.layers + segment.layer];
  const char* from = row_at(pages_of(p, payload), segment, tokens, position);
  char* to = row_at(pages_of(p, payload), segment, tokens, slot);
  if (from == nullptr || to == nullptr) return nullptr;
  shared->from[i] = from;
  shared->to[i] = to;
  const uint32_t high = p.to_back ? end : j;
  const uint32_t q = find_position(p.positions, p.to_back ? j + 1 : begin, high, slot);
  if (q >= high || p.positions[q] != slot || q / kRows<kBlock> == j / kRows<kBlock>) return nullptr;
  return &progress.loaded[q / kRows<kBlock> * p.payloads + payload];
}

// Moves the staged rows of one unit, whose flag is `loaded`. `waited`: the flag that stage_row returned to this thread.
template <class Vector, int kBlock>
__device__ __forceinline__ void move_rows(const CompactShared<kBlock>* shared, int64_t row_bytes, uint32_t* loaded,
                                          const uint32_t* waited) {
  constexpr int kStep = sizeof(Vector);
  const int64_t vectors = row_bytes / kStep;
  const uint32_t lanes = lanes_per_row(vectors, kSliceVectors);
  const int rows_at_once = static_cast<int>(kBlock / lanes), first = static_cast<int>(threadIdx.x / lanes);
  for (int64_t slice = 0; slice < vectors; slice += lanes) {
    const int64_t column = slice + threadIdx.x % lanes;
    const auto moves = [&](int row) {
      return row < static_cast<int>(kRows<kBlock>) && column < vectors && shared->from[row] != nullptr;
    };
    Vector moved[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int row = first + k * rows_at_once;
      if (moves(row)) moved[k] = reinterpret_cast<const Vector*>(shared->from[row])[column];
    }
    block_sync();  // the whole slice is in registers
    const uint32_t progress = units_of(smaller(slice + lanes, vectors) * kStep);
    if (threadIdx.x == 0) store_release(loaded, progress);
    if (waited != nullptr) {
      while (load_acquire(waited) < progress) spin_pause();
    }
    block_sync();  // what the slice overwrites has been read
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int row = first + k * rows_at_once;
      if (moves(row)) reinterpret_cast<Vector*>(shared->to[row])[column] = moved[k];
    }
  }
}

template <int kBlock>
__global__ void __launch_bounds__(kBlock, kResident)
    compact_kernel(const LKV_GRID_CONSTANT CompactParams p, const Progress progress) {
  auto* shared = dyn_smem<CompactShared<kBlock>>();
  write_free_pages<kBlock>(p);
  const auto used = static_cast<uint32_t>(clamp(p.cu_seqlens[p.source.rows()], 0, p.total));
  const auto payloads = static_cast<uint32_t>(p.payloads);
  const uint32_t tiles = (used + kRows<kBlock> - 1) / kRows<kBlock>;
  while (true) {
    if (threadIdx.x == 0) shared->ticket = add_acquire_release(progress.ticket, 1);
    block_sync();
    const uint32_t unit = shared->ticket;
    if (unit >= tiles * payloads) break;
    const uint32_t turn = unit / payloads, payload = unit - turn * payloads;
    const uint32_t tile = p.to_back ? tiles - 1 - turn : turn;
    const uint32_t* waited = nullptr;
    if (warp_id() < kWarps<kBlock>) {
      const int i = threadIdx.x;
      const int64_t row = find_row(p, tile * kRows<kBlock>, i);
      uint32_t staged = 0;
      if (i < static_cast<int>(kRows<kBlock>)) {
        waited = stage_row<kBlock>(p, progress, row, payload, used, tile * kRows<kBlock> + i, i, shared);
        staged = low_bits(shared->from[i]) | low_bits(shared->to[i]);
      }
      staged = __reduce_or_sync(kFullWarp, staged);
      if (lane_id() == 0) shared->bits[warp_id()] = staged;
    }
    block_sync();
    const int64_t row_bytes = p.row_bytes[payload];
    uint32_t bits = static_cast<uint32_t>(row_bytes);
    for (const uint32_t more : shared->bits) bits |= more;
    uint32_t* loaded = &progress.loaded[tile * payloads + payload];
    with_vector(bits, [&](auto vector) { move_rows<decltype(vector), kBlock>(shared, row_bytes, loaded, waited); });
  }
}

template <int kBlock>
int64_t most_units(int64_t total, int64_t payloads) {
  return (total + kRows<kBlock> - 1) / kRows<kBlock> * payloads;
}

template <int kBlock>
Status run(const CompactParams& p, void* scratch, Stream stream) {
  const int64_t units = most_units<kBlock>(p.total, p.payloads);
  if (units == 0 && p.pages == nullptr) return cudaSuccess;
  Device device;
  Status status = Device::of(compact_kernel<kBlock>, device);
  if (status != cudaSuccess) return status;
  auto* flags = static_cast<uint32_t*>(scratch);
  status = cudaMemsetAsync(flags, 0, (1 + units) * sizeof(uint32_t), stream);
  if (status != cudaSuccess) return status;
  const int64_t resident = int64_t{device.multiprocessors} * kResident;
  const Grid grid = {.blocks = std::clamp<int64_t>(units, 1, std::min(resident, kMaxBlocks)),
                     .block = kBlock,
                     .shared = sizeof(CompactShared<kBlock>)};
  return launch(compact_kernel<kBlock>, grid, stream, p, Progress{flags, flags + 1});
}

template <int kBlock>
Status run_fill(const CompactParams& p, Stream stream) {
  const int64_t units = (p.total + kBlock - 1) / kBlock * std::max<int64_t>(1, p.payloads);
  if (units == 0 && p.pages == nullptr) return cudaSuccess;
  Device device;
  const Status status = Device::of(fill_kernel<kBlock>, device);
  if (status != cudaSuccess) return status;
  const int64_t resident = int64_t{device.multiprocessors} * (kResidentThreads / kBlock);
  const Grid grid = {.blocks = std::clamp<int64_t>(units, 1, std::min(resident, kMaxBlocks)),
                     .block = kBlock,
                     .shared = sizeof(FillShared<kBlock>)};
  return launch(fill_kernel<kBlock>, grid, stream, p);
}

}  // namespace

size_t compact_scratch(int64_t total, int64_t payloads, const Tuning& tuning) {
  return with_block<kProductionBlock>(
      tuning, [&]<int kBlock> { return (1 + most_units<kBlock>(total, payloads)) * sizeof(uint32_t); });
}

size_t compact_scratch(int64_t total, int64_t payloads) {
  return compact_scratch(total, payloads, {});
}

Status compact(const CompactParams& p, void* scratch, Stream stream, const Tuning& tuning) {
  CompactParams params = p;
  // Positions reach any row of a segment; its valid range matters only where it ends, and for its pages.
  if (!p.to_back && p.pages == nullptr) params.source.lengths = params.source.starts = RowInts{};
  return with_block<kProductionBlock>(tuning, [&]<int kBlock> {
    return p.filled == nullptr ? run<kBlock>(params, scratch, stream) : run_fill<kBlock>(params, stream);
  });
}

Status compact(const CompactParams& p, void* scratch, Stream stream) {
  return compact(p, scratch, stream, {});
}

}  // namespace lkv::cuda
