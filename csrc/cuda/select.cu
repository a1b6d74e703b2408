#include "launch.h"
#include "select_cluster.cuh"
#include "select_split.cuh"
#include "tuning.h"

namespace lkv::cuda {
namespace {

constexpr int kBlock = 512;
constexpr int kMaxCluster = 16;
constexpr int64_t kShortSlice = 4096;  // keys per block below which more blocks cost more than they save
constexpr int kMaxSplits = 64;

// How a select is launched: `splits` independent blocks per row set, or with 0 one cluster.
struct Plan {
  int block = kBlock, cluster = 1, splits = 0;
  uint32_t on_chip = 0;  // keys per block
  size_t shared = 0;
};

size_t shared_of(int block, uint32_t on_chip) {
  const size_t base = block == kTestBlock ? sizeof(ClusterShared<kTestBlock>) : sizeof(ClusterShared<kBlock>);
  return base + on_chip * sizeof(uint32_t);
}

// Blocks are added to a row set until its keys fit on chip, and further while multiprocessors would idle.
int choose_cluster(const Device& device, int64_t rows, int64_t longest, int64_t fits) {
  int cluster = 1;
  const auto slice = [&] { return longest / cluster; };
  while (cluster < kMaxCluster &&
         (slice() > fits || (slice() > kShortSlice && rows * cluster * 2 <= device.multiprocessors))) {
    cluster *= 2;
  }
  return cluster;
}

Plan plan_select(const Device& device, int64_t rows, int64_t longest, const Tuning& tuning) {
  Plan plan;
  if (tuning.block > 0) plan.block = tuning.block;
  const int64_t room = (device.shared_per_block - static_cast<int64_t>(shared_of(plan.block, 0))) / sizeof(uint32_t);
  const int64_t fits = tuning.resident >= 0 ? std::min<int64_t>(tuning.resident, room) : room;
  if (tuning.splits >= 0) {
    plan.splits = tuning.splits;
  } else if (!device.clusters && longest > fits && rows * 2 <= device.multiprocessors) {
    plan.splits = static_cast<int>(std::clamp<int64_t>(2 * device.multiprocessors / rows, 2, kMaxSplits));
  }
  if (plan.splits == 0 && device.clusters) {
    plan.cluster = tuning.cluster > 0 ? tuning.cluster : choose_cluster(device, rows, longest, fits);
  }
  const uint32_t warps = plan.block / kWarp;
  const int64_t slice = int64_t{keys_per_warp(static_cast<uint32_t>(longest), plan.cluster * warps)} * warps;
  plan.on_chip = slice <= fits ? static_cast<uint32_t>(slice) : 0;
  plan.shared = shared_of(plan.block, plan.on_chip);
  return plan;
}

size_t scratch_of(const Plan& plan, int64_t rows) {
  if (plan.splits == 0) return 0;
  return rows * (sizeof(SplitRow) + plan.splits * (plan.block / kWarp) * sizeof(Counts));
}

template <class Kernel>
Status allow(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <ScoreType type, int kBlock>
Status run_cluster(const SelectParams& p, const Device& device, Plan plan, Stream stream) {
  auto* kernel = select_kernel<type, kBlock>;
  Status status = cudaSuccess;
  if (plan.shared > kDefaultShared) {
    status = allow(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
  }
  if (status == cudaSuccess && plan.cluster > kPortableCluster) {
    status = allow(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (status != cudaSuccess) return status;
  const int64_t clusters = std::min(p.source.rows(), kMaxBlocks / plan.cluster);
  const Grid grid = {.blocks = clusters * plan.cluster,
                     .block = kBlock,
                     .shared = plan.shared,
                     .cluster = plan.cluster,
                     .dependent = device.clusters};
  return launch(kernel, grid, stream, p, plan.on_chip);
}

template <ScoreType type, int kBlock>
Status run_split(const SelectParams& p, const Plan& plan, void* scratch, Stream stream) {
  const int64_t rows = p.source.rows();
  auto* split_rows = static_cast<SplitRow*>(scratch);
  const Split split = {split_rows, reinterpret_cast<Counts*>(split_rows + rows), static_cast<uint32_t>(plan.splits)};
  const Grid grid = {.blocks = rows * plan.splits, .block = kBlock, .shared = sizeof(SplitShared<kBlock>)};
  Status status = cudaMemsetAsync(split_rows, 0, rows * sizeof(SplitRow), stream);
  for (int round = 0; round < kRounds<type> && status == cudaSuccess; ++round) {
    status = launch(split_histogram_kernel<type, kBlock>, grid, stream, p, split, round);
  }
  if (status == cudaSuccess) status = launch(split_count_kernel<type, kBlock>, grid, stream, p, split);
  if (status == cudaSuccess) status = launch(split_emit_kernel<type, kBlock>, grid, stream, p, split);
  return status;
}

template <int kBlock>
Status run(const SelectParams& p, const Device& device, const Plan& plan, void* scratch, Stream stream) {
  const auto typed = [&]<ScoreType type> {
    return plan.splits > 0 ? run_split<type, kBlock>(p, plan, scratch, stream)
                           : run_cluster<type, kBlock>(p, device, plan, stream);
  };
  switch (p.type) {
    case ScoreType::f32:
      return typed.template operator()<ScoreType::f32>();
    case ScoreType::f16:
      return typed.template operator()<ScoreType::f16>();
    case ScoreType::bf16:
      return typed.template operator()<ScoreType::bf16>();
  }
  return cudaErrorInvalidValue;
}

}  // namespace

size_t select_scratch(int64_t rows, int64_t longest, const Tuning& tuning) {
  Device device;
  if (rows == 0 || Device::current(device) != cudaSuccess) return 0;
  return scratch_of(plan_select(device, rows, longest, tuning), rows);
}

size_t select_scratch(int64_t rows, int64_t longest) {
  return select_scratch(rows, longest, {});
}

Status select(const SelectParams& p, int64_t longest, void* scratch, Stream stream, const Tuning& tuning) {
  const int64_t rows = p.source.rows();
  if (rows == 0) return cudaMemsetAsync(p.positions, 0xff, p.total * sizeof(int32_t), stream);
  Device device;
  const Status status = Device::current(device);
  if (status != cudaSuccess) return status;
  const Plan plan = plan_select(device, rows, longest, tuning);
  return plan.block == kTestBlock ? run<kTestBlock>(p, device, plan, scratch, stream)
                                  : run<kBlock>(p, device, plan, scratch, stream);
}

Status select(const SelectParams& p, int64_t longest, void* scratch, Stream stream) {
  return select(p, longest, scratch, stream, {});
}

}  // namespace lkv::cuda
