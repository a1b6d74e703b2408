#include "gather_tile.cuh"
#include "select_plan.h"

// Evict. A small eviction is one launch: the blocks of a cluster select the rows of a segment (select_cluster.cuh) and,
// after a barrier, move them as tiles (gather_tile.cuh). At the end all blocks clear the rows behind the last span.
// This is faster while each block moves no more than a tile of K and V. A larger one is a select and a gather that
// starts beside it: tiles of the gather balance skewed budgets.

namespace lkv::cuda {
namespace {

template <int kBlock>
struct EvictShared {
  ClusterShared<kBlock> select;
  TileShared tile;
};

template <ScoreType type, int kBlock>
__global__ void __launch_bounds__(kBlock, kResidentThreads / kBlock)
    evict_kernel(const LKV_GRID_CONSTANT SelectParams p, const LKV_GRID_CONSTANT GatherParams g,
                 const uint32_t warp_capacity) {
  grid_dependency_wait();
  auto* shared = dyn_smem<EvictShared<kBlock>>();
  Cluster cluster;
  meet(&shared->select, cluster);
  const auto rows = static_cast<uint32_t>(p.source.rows());
  // One turn more than there are segments: in the last, all blocks clear what lies behind the last span.
  bool ends = false;
  for (uint32_t row = blockIdx.x >> cluster.shift; !ends; row += gridDim.x >> cluster.shift) {
    ends = row >= rows;
    if (!ends) {
      select_row<type, kBlock, KeysIn::registers>(p, row, warp_capacity, cluster, &shared->select);
      cluster.sync();
    }
    const auto begin = static_cast<uint32_t>(clamp(p.cu_seqlens[ends ? rows : row], 0, p.total));
    const auto end = static_cast<uint32_t>(ends ? p.total : clamp(p.cu_seqlens[row + 1], begin, p.total));
    const uint32_t block = ends ? blockIdx.x : cluster.rank, blocks = ends ? gridDim.x : cluster.size;
    for (uint32_t first = begin + block * kTileRows; first < end; first += blocks * kTileRows) {
      const int count = static_cast<int>(end - first < kTileRows ? end - first : kTileRows);
      copy_tile<kBlock>(
          g, first, count, &shared->tile, [&](int i) { return i < count && !ends ? int64_t{row} : -1; },
          [](int64_t) {});
    }
  }
}

static_assert(sizeof(EvictShared<kSelectBlock>) == kSelectShared + kMoveShared);

bool fuses(const SelectSizes& x, const Plan& plan, int64_t bytes, const Tuning& tuning) {
  if (tuning.fused >= 0) return tuning.fused > 0;
  if (env_is("LKV_CUDA_EVICT", "fused")) return true;
  if (env_is("LKV_CUDA_EVICT", "pair")) return false;
  return x.fuses(plan, bytes);
}

template <int kBlock>
Status run(const SelectParams& p, const GatherParams& g, const Device& device, const SelectSizes& x, const Plan& plan,
           Stream stream) {
  return with_type(p.type, [&]<ScoreType type> {
    const auto kernel_of = [](const Plan&) { return evict_kernel<type, kBlock>; };
    return launch_clusters(kernel_of, device, x, plan, 1, stream, p, g);
  });
}

}  // namespace

Status evict(const SelectParams& p, const GatherParams& g, int64_t longest, int64_t bytes, void* scratch, Stream stream,
             const Tuning& tuning) {
  Device device;
  Status status = Device::of(evict_kernel<ScoreType::f32, kSelectBlock>, device);
  if (status != cudaSuccess) return status;
  const int64_t beside = with_block<kSelectBlock>(
      tuning, [&]<int kBlock> { return sizeof(EvictShared<kBlock>) - sizeof(ClusterShared<kBlock>); });
  const SelectSizes x = sizes_of(device, p.source.rows(), longest, tuning, beside);
  const Plan plan = plan_clusters(x);
  if (x.rows == 0 || !fuses(x, plan, bytes, tuning)) {
    status = select(p, longest, scratch, stream, tuning);
    return status == cudaSuccess ? gather(g, /*behind_select=*/x.rows > 0, stream, tuning) : status;
  }
  GatherParams moved = g;
  moved.source.lengths = moved.source.starts = RowInts{};  // a gather reads any position of a segment
  return with_block<kSelectBlock>(tuning, [&]<int kBlock> { return run<kBlock>(p, moved, device, x, plan, stream); });
}

Status evict(const SelectParams& p, const GatherParams& g, int64_t longest, int64_t bytes, void* scratch,
             Stream stream) {
  return evict(p, g, longest, bytes, scratch, stream, {});
}

}  // namespace lkv::cuda
