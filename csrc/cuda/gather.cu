#include "gather_bulk.cuh"
#include "launch.h"
#include "tuning.h"

namespace lkv::cuda {
namespace {

template <int kBlock>
__global__ void __launch_bounds__(kBlock) gather_kernel(const LKV_GRID_CONSTANT GatherParams p) {
  auto* shared = dyn_smem<TileShared>();
  for (int64_t first = int64_t{blockIdx.x} * kTileRows; first < p.total; first += int64_t{gridDim.x} * kTileRows) {
    const int rows = static_cast<int>(p.total - first < kTileRows ? p.total - first : kTileRows);
    copy_tile<kBlock>(p, first, rows, shared, [&](int i) { return find_token(p, first, i); });
  }
  // What follows on the stream waits for this grid alone: it must not end before the select does.
  grid_dependency_wait();
}

// Rows move through registers unless the caller or the environment asks for bulk copies.
bool moves_in_bulk(const Tuning& tuning) {
  return tuning.bulk >= 0 ? tuning.bulk > 0 : asked("LKV_CUDA_GATHER", "bulk");
}

}  // namespace

Status gather(const GatherParams& p, bool behind_select, Stream stream, const Tuning& tuning) {
  Device device;
  const Status status = Device::current(device);
  if (status != cudaSuccess) return status;
  GatherParams params = p;
  params.source.lengths = params.source.starts = RowInts{};  // a gather reads any position of a row set
  const int64_t tiles = std::min((p.total + kTileRows - 1) / kTileRows, kMaxBlocks);
  Grid grid = {.blocks = tiles, .shared = sizeof(TileShared), .dependent = behind_select && device.clusters};
  if (device.clusters && moves_in_bulk(tuning)) {
    grid.block = kBulkBlock;
    grid.shared = sizeof(BulkShared);
    return launch(gather_bulk_kernel, grid, stream, params);
  }
  return with_block<512>(tuning, [&]<int kBlock> {
    grid.block = kBlock;
    return launch(gather_kernel<kBlock>, grid, stream, params);
  });
}

Status gather(const GatherParams& p, bool behind_select, Stream stream) {
  return gather(p, behind_select, stream, {});
}

}  // namespace lkv::cuda
