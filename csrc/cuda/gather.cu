#include "block_scan.cuh"
#include "launch.h"
#include "rows_copy.cuh"
#include "tuning.h"

namespace lkv::cuda {
namespace {

constexpr int kTileRows = 64;     // output rows per tile: skewed budgets balance, as tiles know no row sets
constexpr int kPayloadGroup = 4;  // payloads whose addresses are found together

// Where the rows of one tile come from; nullptr: zeros.
struct TileShared {
  const char* source[kPayloadGroup][kTileRows];
  uint32_t address_bits[kPayloadGroup][kTileRows / kWarp];  // or-ed
};

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

struct TokenRow {
  RowSet set;
  int64_t position;  // -1: zeros
};

__device__ __forceinline__ TokenRow find_token(const GatherParams& p, int64_t j) {
  TokenRow token = {{}, -1};
  const int64_t row = j < p.total ? row_of(p.cu_seqlens, p.source.rows(), j) : -1;
  if (row < 0) return token;
  if (p.ready != nullptr) {
    while (load_acquire(&p.ready[row]) == 0) spin_pause();
  }
  token.set = row_set(p.source, row);
  const int64_t position = p.positions[j];
  if (position >= 0 && position < token.set.limit) token.position = position;
  return token;
}

__device__ __forceinline__ void stage_tile(const GatherParams& p, int64_t first, int64_t payload, int payloads,
                                           TileShared* shared) {
  for (int i = threadIdx.x; i < kTileRows; i += blockDim.x) {
    const TokenRow token = find_token(p, first + i);
    for (int g = 0; g < payloads; ++g) {
      const Strided& input = p.inputs[(payload + g) * p.source.layers + token.set.layer];
      const char* source = token.position < 0 ? nullptr : token.set.at(input, token.position);
      shared->source[g][i] = source;
      const uint32_t bits = __reduce_or_sync(kFullWarp, low_bits(source));
      if (lane_id() == 0) shared->address_bits[g][i / kWarp] = bits;
    }
  }
}

template <int kBlock>
__device__ __forceinline__ void copy_payload(const GatherParams& p, int64_t first, int64_t payload, int rows,
                                             const char* const* source, const uint32_t* address_bits) {
  const int64_t row_bytes = p.row_bytes[payload];
  char* out = p.outputs[payload] + first * row_bytes;
  uint32_t bits = low_bits(out) | static_cast<uint32_t>(row_bytes);
#pragma unroll
  for (int w = 0; w < kTileRows / kWarp; ++w) bits |= address_bits[w];
  with_vector(bits, [&](auto vector) {
    copy_rows<decltype(vector), kBlock>([&](int row) { return source[row]; }, out, row_bytes, rows);
  });
}

template <int kBlock>
__global__ void __launch_bounds__(kBlock) gather_kernel(const LKV_GRID_CONSTANT GatherParams p) {
  auto* shared = dyn_smem<TileShared>();
  for (int64_t first = int64_t{blockIdx.x} * kTileRows; first < p.total; first += int64_t{gridDim.x} * kTileRows) {
    const int rows = static_cast<int>(p.total - first < kTileRows ? p.total - first : kTileRows);
    for (int64_t payload = 0; payload < p.payloads; payload += kPayloadGroup) {
      const int group = static_cast<int>(p.payloads - payload < kPayloadGroup ? p.payloads - payload : kPayloadGroup);
      stage_tile(p, first, payload, group, shared);
      block_sync();
      for (int g = 0; g < group; ++g) {
        copy_payload<kBlock>(p, first, payload + g, rows, shared->source[g], shared->address_bits[g]);
      }
      block_sync();
    }
  }
  // What follows on the stream waits for this grid alone: it must not end before the select does.
  grid_dependency_wait();
}

template <int kBlock>
Status run(const GatherParams& p, bool dependent, Stream stream) {
  const int64_t tiles = (p.total + kTileRows - 1) / kTileRows;
  return launch(
      gather_kernel<kBlock>,
      {.blocks = std::min(tiles, kMaxBlocks), .block = kBlock, .shared = sizeof(TileShared), .dependent = dependent},
      stream, p);
}

}  // namespace

Status gather(const GatherParams& p, bool behind_select, Stream stream, const Tuning& tuning) {
  Device device;
  const Status status = Device::current(device);
  if (status != cudaSuccess) return status;
  GatherParams params = p;
  params.source.lengths = params.source.starts = RowInts{};  // a gather reads any position of a row set
  const bool dependent = behind_select && device.clusters;
  return tuning.block == kTestBlock ? run<kTestBlock>(params, dependent, stream) : run<256>(params, dependent, stream);
}

Status gather(const GatherParams& p, bool behind_select, Stream stream) {
  return gather(p, behind_select, stream, {});
}

}  // namespace lkv::cuda
