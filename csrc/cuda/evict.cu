#include "gather_tile.cuh"
#include "select_plan.h"

// Small evictions in one launch: the cluster that has selected a row set's rows moves them as well. It has as many
// blocks as the device has room for, and keys in registers. Large ones are a select with a gather beside it.

namespace lkv::cuda {
namespace {

constexpr int64_t kLeastRow = 256;         // keys per block
constexpr int64_t kFusedBytes = 64 << 10;  // of the output per block, up to which the launch saved is worth it

template <int kBlock>
struct EvictShared {
  ClusterShared<kBlock> select;
  TileShared tile;
};

template <ScoreType type, int kBlock>
__global__ void __launch_bounds__(kBlock)
    evict_kernel(const LKV_GRID_CONSTANT SelectParams p, const LKV_GRID_CONSTANT GatherParams g,
                 const uint32_t warp_room) {
  grid_dependency_wait();
  auto* shared = dyn_smem<EvictShared<kBlock>>();
  const Cluster cluster = {cluster_rank(), cluster_size()};
  const int64_t rows = p.source.rows();
  // Output rows [begin, end), tile by tile over `blocks` blocks.
  const auto copy = [&](int64_t begin, int64_t end, int64_t block, int64_t blocks, auto&& token_at) {
    for (int64_t first = begin + block * kTileRows; first < end; first += blocks * kTileRows) {
      const int count = static_cast<int>(end - first < kTileRows ? end - first : kTileRows);
      copy_tile<kBlock>(g, first, count, &shared->tile, [&](int i) { return token_at(i < count ? first + i : -1); });
    }
  };
  for (int64_t row = blockIdx.x / cluster.size; row < rows; row += gridDim.x / cluster.size) {
    select_row<type, kBlock, KeysIn::registers>(p, row, warp_room, cluster, &shared->select);
    cluster.sync();
    const int64_t begin = clamp(p.cu_seqlens[row], 0, p.total), end = clamp(p.cu_seqlens[row + 1], begin, p.total);
    copy(begin, end, cluster.rank, cluster.size,
         [&](int64_t j) { return j < 0 ? TokenRow{{}, -1} : token_of(g, row, j); });
  }
  const int64_t used = clamp(p.cu_seqlens[rows], 0, p.total);
  copy(used, p.total, blockIdx.x, gridDim.x, [](int64_t) { return TokenRow{{}, -1}; });
}

// As many blocks as run at once, as long as each has something to select from.
Plan plan_fused(const SelectSize& x) {
  if (!x.device.clusters) return x.with_cluster(1);
  if (x.tuning.cluster > 0) return x.with_cluster(x.tuning.cluster);
  int cluster = 1;
  while (cluster < kMaxCluster && x.rows * cluster * 2 <= x.device.multiprocessors && x.longest > kLeastRow * cluster) {
    cluster *= 2;
  }
  return x.with_cluster(cluster);
}

bool fuses(const SelectSize& x, const Plan& plan, int64_t bytes) {
  if (x.tuning.fused >= 0) return x.tuning.fused > 0;
  const int64_t blocks = std::min<int64_t>(x.rows * plan.cluster, x.device.multiprocessors);
  return plan.keys_in == KeysIn::registers && bytes <= blocks * kFusedBytes;
}

template <int kBlock>
Status run(const SelectParams& p, const GatherParams& g, const SelectSize& x, const Plan& plan, Stream stream) {
  return with_type(p.type, [&]<ScoreType type> {
    const auto kernel_of = [](const Plan&) { return evict_kernel<type, kBlock>; };
    return launch_clusters(kernel_of, x, plan, 1, stream, p, g);
  });
}

}  // namespace

Status evict(const SelectParams& p, const GatherParams& g, int64_t longest, int64_t bytes, void* scratch, Stream stream,
             const Tuning& tuning) {
  Device device;
  Status status = Device::current(device);
  if (status != cudaSuccess) return status;
  SelectSize x = {device, p.source.rows(), longest, tuning};
  x.beside = tuning.block == kTestBlock ? sizeof(EvictShared<kTestBlock>) - sizeof(ClusterShared<kTestBlock>)
                                        : sizeof(EvictShared<kSelectBlock>) - sizeof(ClusterShared<kSelectBlock>);
  const Plan plan = plan_fused(x);
  if (x.rows == 0 || !fuses(x, plan, bytes)) {
    status = select(p, longest, scratch, stream, tuning);
    return status == cudaSuccess ? gather(g, /*behind_select=*/true, stream, tuning) : status;
  }
  GatherParams moved = g;
  moved.source.lengths = moved.source.starts = RowInts{};  // a gather reads any position of a row set
  return with_block<kSelectBlock>(tuning, [&]<int kBlock> { return run<kBlock>(p, moved, x, plan, stream); });
}

Status evict(const SelectParams& p, const GatherParams& g, int64_t longest, int64_t bytes, void* scratch,
             Stream stream) {
  return evict(p, g, longest, bytes, scratch, stream, {});
}

}  // namespace lkv::cuda
