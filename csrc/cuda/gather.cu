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
    copy_tile<kBlock>(
        p, first, rows, shared, [&](int i) { return find_row(p, first, i); },
        [&](int64_t row) { wait_for_select(p, row); });
  }
  // The next work on the stream waits for this grid alone, so it must not end before the select does.
  grid_dependency_wait();
}

// Rows move through registers unless the caller or the environment asks for bulk copies.
bool moves_in_bulk(const Tuning& tuning) {
  return tuning.bulk >= 0 ? tuning.bulk > 0 : env_is("LKV_CUDA_GATHER", "bulk");
}

// Behind a select the grid starts while that runs, where the code of the kernel can wait for it.
Status run(void (*kernel)(GatherParams), const GatherParams& p, const Device& device, bool behind_select, int block,
           size_t shared, Stream stream) {
  const Grid grid = {.blocks = std::min((p.total + kTileRows - 1) / kTileRows, kMaxBlocks),
                     .block = block,
                     .shared = shared,
                     .dependent = behind_select && device.clusters};
  return launch(kernel, grid, stream, p);
}

}  // namespace

Status gather(const GatherParams& p, bool behind_select, Stream stream, const Tuning& tuning) {
  GatherParams params = p;
  params.source.lengths = params.source.starts = RowInts{};  // a gather reads any position of a segment
  Device device;
  if (moves_in_bulk(tuning)) {
    const Status status = Device::of(gather_bulk_kernel, device);
    if (status != cudaSuccess) return status;
    if (device.clusters) {
      return run(gather_bulk_kernel, params, device, behind_select, kBulkBlock, sizeof(BulkShared), stream);
    }
  }
  return with_block<512>(tuning, [&]<int kBlock>() -> Status {
    const Status status = Device::of(gather_kernel<kBlock>, device);
    if (status != cudaSuccess) return status;
    return run(gather_kernel<kBlock>, params, device, behind_select, kBlock, sizeof(TileShared), stream);
  });
}

Status gather(const GatherParams& p, bool behind_select, Stream stream) {
  return gather(p, behind_select, stream, {});
}

}  // namespace lkv::cuda
