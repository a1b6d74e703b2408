#include "gather_warp.cuh"
#include "launch.h"
#include "tuning.h"

// Gather, and evict: a select with a gather that starts beside it.

namespace lkv::cuda {
namespace {

constexpr int kProductionBlock = 256;
constexpr int kSlots = 32;  // warps of a multiprocessor that move rows

// Warps that registers are bounded for: the code for sm_120 would spill with as many as the others have.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kResident = 24;
#else
constexpr int kResident = kSlots;
#endif

// `kTables`: the tables fit into shared memory.
template <int kBlock, bool kTables>
__global__ void __launch_bounds__(kBlock, kResident* kWarp / kBlock)
    gather_kernel(const LKV_GRID_CONSTANT GatherParams given, const int shift) {
  const auto params = [&] {
    if constexpr (kTables) return with_tables(given, dyn_smem<GatherTables>());
    return given;
  };
  const GatherParams p = params();
  // Rows are counted in 31 bits.
  const uint32_t chunk = kBlock / kWarp << shift, begin = blockIdx.x * chunk;
  gather_rows(p, begin + (warp_id() << shift), shift, [&] {
    if (p.ready == nullptr || p.source.rows() == 0) return;
    // One warp waits for all, as every acquire empties the L1 cache.
    if (warp_id() == 0) wait_for_rows(p, begin, smaller(int64_t{begin} + chunk, p.total));
    block_sync();
  });
  // The next work on the stream waits for this grid alone, so it must not end before the select does.
  grid_dependency_wait();
}

// As many rows for every warp as leave all of them something to do, up to 16.
int choose_shift(int64_t total, int64_t multiprocessors) {
  int shift = kMostShift;
  while (shift > 0 && (total >> shift) < multiprocessors * kSlots / 2) --shift;
  return shift;
}

template <int kBlock>
Status run(const GatherParams& p, bool behind_select, Stream stream, const Tuning& tuning) {
  Device device;
  const Status status = Device::of(gather_kernel<kBlock, true>, device);
  if (status != cudaSuccess) return status;
  const int shift = choose_shift(p.total, device.multiprocessors);
  const int64_t chunk = int64_t{kBlock / kWarp} << shift;
  const bool tables = tuning.tables != 0 && fit_tables(p);
  const Grid grid = {.blocks = (p.total + chunk - 1) / chunk,
                     .block = kBlock,
                     .shared = tables ? sizeof(GatherTables) : 0,
                     .dependent = behind_select && device.clusters};
  return tables ? launch(gather_kernel<kBlock, true>, grid, stream, p, shift)
                : launch(gather_kernel<kBlock, false>, grid, stream, p, shift);
}

}  // namespace

// Behind a select the grid starts while that runs, where the code of the kernel can wait for it.
Status gather(const GatherParams& p, bool behind_select, Stream stream, const Tuning& tuning) {
  GatherParams params = p;
  params.source.lengths = params.source.starts = RowInts{};  // a gather reads any position of a segment
  return with_block<kProductionBlock>(tuning,
                                      [&]<int kBlock> { return run<kBlock>(params, behind_select, stream, tuning); });
}

Status gather(const GatherParams& p, bool behind_select, Stream stream) {
  return gather(p, behind_select, stream, {});
}

Status evict(const SelectParams& p, const GatherParams& g, int64_t longest, void* scratch, Stream stream,
             const Tuning& tuning) {
  const Status status = select(p, longest, scratch, stream, tuning);
  return status == cudaSuccess ? gather(g, /*behind_select=*/p.source.rows() > 0, stream, tuning) : status;
}

Status evict(const SelectParams& p, const GatherParams& g, int64_t longest, void* scratch, Stream stream) {
  return evict(p, g, longest, scratch, stream, {});
}

}  // namespace lkv::cuda
