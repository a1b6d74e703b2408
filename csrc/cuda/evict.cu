#include "gather_tile.cuh"
#include "select_plan.h"

// Small evictions in one launch: the blocks that have selected a row set's rows move them as well, which is worth it
// where each has little to move. Otherwise a select with a gather beside it, whose tiles balance whatever the budgets
// are.

namespace lkv::cuda {
namespace {

constexpr int64_t kFusedBytes = 32 << 10;  // of the output per block: a tile of K and V

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
  Cluster cluster;
  meet(&shared->select, cluster);
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

bool fuses(const SelectSize& x, const Plan& plan, int64_t bytes) {
  if (x.tuning.fused >= 0) return x.tuning.fused > 0;
  if (asked("LKV_CUDA_EVICT", "fused")) return true;
  if (asked("LKV_CUDA_EVICT", "pair")) return false;
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
  const Plan plan = plan_clusters(x);
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
