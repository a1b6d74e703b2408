#include "launch.h"
#include "lkv/segments.h"
#include "rows_copy.cuh"
#include "tuning.h"

// Eviction in place: kept rows move to the front of their segment. A block takes one payload of one segment, or some
// slices of its bytes where there are fewer of those than multiprocessors:
//   1. The block takes as many of the next kept rows as its threads hold in registers.
//   2. Every thread loads its vectors of these rows, except where a row is in place already.
//   3. After a barrier it stores them to their new rows.
// Rows only move towards the front, so a store never reaches a row that a later tile loads.

namespace lkv::cuda {
namespace {

constexpr int kProductionBlock = 512;
constexpr uint32_t kSliceVectors = 4;  // vectors of a row that move in one slice

// Which (segment, payload) a block moves, and the slices of its rows: bytes of different slices never meet.
struct Slices {
  int64_t first, step;
};

// Moves the slices of one segment's rows.
template <class Vector, int kBlock>
__device__ __forceinline__ void move_rows(char* rows, int64_t stride, int64_t limit, int64_t row_bytes,
                                          const int32_t* positions, int64_t keep, const Slices& slices) {
  const int64_t vectors = row_bytes / static_cast<int64_t>(sizeof(Vector));
  const uint32_t lanes = lanes_per_row(vectors, kSliceVectors);
  const int64_t step = kBlock / lanes;
  for (int64_t slice = slices.first; slice * lanes < vectors; slice += slices.step) {
    const int64_t column = slice * lanes + threadIdx.x % lanes;
    const bool inside = column < vectors;
    char* slot = rows + column * static_cast<int64_t>(sizeof(Vector));
    for (int64_t tile = 0; tile < keep; tile += step * kInFlight) {
      const int64_t first = tile + threadIdx.x / lanes;
      Vector moved[kInFlight];
      bool moves[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const int64_t to = first + k * step;
        const int64_t from = inside && to < keep ? positions[to] : to;
        moves[k] = from != to && from >= 0 && from < limit;
        if (moves[k]) moved[k] = *reinterpret_cast<const Vector*>(slot + from * stride);
      }
      block_sync();
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        if (moves[k]) *reinterpret_cast<Vector*>(slot + (first + k * step) * stride) = moved[k];
      }
    }
  }
}

template <int kBlock>
__global__ void __launch_bounds__(kBlock, kProductionBlock * 2 / kBlock)
    compact_kernel(const LKV_GRID_CONSTANT CompactParams p, const int64_t slices) {
  const int64_t units = p.source.rows() * p.payloads * slices;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int64_t payload = unit / slices % p.payloads, row = unit / slices / p.payloads;
    const Segment segment = segment_of(p.source, row);
    const Strided& tokens = p.payload[payload * p.source.layers + segment.layer];
    const int64_t row_bytes = p.row_bytes[payload];
    const int32_t* positions = p.positions + p.cu_seqlens[row];
    const int64_t keep = clamp(p.lengths[row], 0, segment.limit);
    char* rows = segment.at(tokens, 0);
    const uint32_t bits = low_bits(rows) | static_cast<uint32_t>(tokens.token | row_bytes);
    with_vector(bits, [&](auto vector) {
      move_rows<decltype(vector), kBlock>(rows, tokens.token, segment.limit, row_bytes, positions, keep,
                                          {unit % slices, slices});
    });
  }
}

template <int kBlock>
Status run(const CompactParams& p, Stream stream) {
  const int64_t moves = p.source.rows() * p.payloads;
  if (moves == 0) return cudaSuccess;
  Device device;
  const Status status = Device::of(compact_kernel<kBlock>, device);
  if (status != cudaSuccess) return status;
  const int64_t slices = std::clamp<int64_t>(2 * device.multiprocessors / moves, 1, 16);
  return launch(compact_kernel<kBlock>, {.blocks = std::min(moves * slices, kMaxBlocks), .block = kBlock}, stream, p,
                slices);
}

}  // namespace

Status compact(const CompactParams& p, Stream stream, const Tuning& tuning) {
  CompactParams params = p;
  params.source.lengths = params.source.starts = RowInts{};  // positions reach any row of a segment
  return with_block<kProductionBlock>(tuning, [&]<int kBlock> { return run<kBlock>(params, stream); });
}

Status compact(const CompactParams& p, Stream stream) {
  return compact(p, stream, {});
}

}  // namespace lkv::cuda
