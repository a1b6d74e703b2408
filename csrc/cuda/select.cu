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

// What a plan is made from.
struct Problem {
  const Device& device;
  int64_t rows, longest;
  const Tuning& tuning;

  int block() const { return tuning.block > 0 ? tuning.block : kBlock; }

  size_t shared(int64_t on_chip) const {
    const size_t fixed = block() == kTestBlock ? sizeof(ClusterShared<kTestBlock>) : sizeof(ClusterShared<kBlock>);
    return fixed + on_chip * sizeof(uint32_t);
  }

  // Keys of one block, and how many of them it could hold on chip.
  int64_t slice(int cluster) const {
    const uint32_t warps = block() / kWarp;
    return int64_t{keys_per_warp(static_cast<uint32_t>(longest), cluster * warps)} * warps;
  }
  int64_t fits() const {
    const int64_t room = (device.shared_per_block - static_cast<int64_t>(shared(0))) / sizeof(uint32_t);
    return tuning.resident >= 0 ? std::min<int64_t>(tuning.resident, room) : room;
  }

  Plan with_cluster(int cluster) const {
    Plan plan = {.block = block(), .cluster = cluster};
    if (slice(cluster) <= fits()) plan.on_chip = static_cast<uint32_t>(slice(cluster));
    plan.shared = shared(plan.on_chip);
    return plan;
  }
};

// Blocks are added to a row set until its keys fit on chip, and further while multiprocessors would idle.
int choose_cluster(const Problem& x) {
  int cluster = 1;
  const auto idle = [&] { return x.slice(cluster) > kShortSlice && x.rows * cluster * 2 <= x.device.multiprocessors; };
  while (cluster < kMaxCluster && (x.slice(cluster) > x.fits() || idle())) cluster *= 2;
  return cluster;
}

int choose_splits(const Problem& x) {
  if (x.tuning.splits >= 0) return x.tuning.splits;
  if (x.device.clusters || x.slice(1) <= x.fits() || x.rows * 2 > x.device.multiprocessors) return 0;
  return static_cast<int>(std::clamp<int64_t>(2 * x.device.multiprocessors / x.rows, 2, kMaxSplits));
}

Plan make_plan(const Problem& x) {
  const int splits = choose_splits(x);
  if (splits > 0) return {.block = x.block(), .splits = splits};
  if (!x.device.clusters) return x.with_cluster(1);
  return x.with_cluster(x.tuning.cluster > 0 ? x.tuning.cluster : choose_cluster(x));
}

size_t scratch_of(const Plan& plan, int64_t rows) {
  if (plan.splits == 0) return 0;
  return rows * (sizeof(SplitRow) + plan.splits * (plan.block / kWarp) * sizeof(Counts));
}

template <class Kernel>
Status allow(Kernel* kernel, const Device& device, const Plan& plan) {
  cudaError_t status = cudaSuccess;
  if (plan.shared > kDefaultShared) {
    // Always the same value, as other threads may launch the kernel meanwhile.
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
  }
  if (status == cudaSuccess && plan.cluster > kPortableCluster) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return status;
}

template <ScoreType type, int kBlock>
Status run_cluster(const SelectParams& p, const Problem& x, Plan plan, Stream stream) {
  auto* kernel = select_kernel<type, kBlock>;
  const auto grid_of = [&](const Plan& plan) {
    return Grid{.blocks = std::min(x.rows, kMaxBlocks / plan.cluster) * plan.cluster,
                .block = kBlock,
                .shared = plan.shared,
                .cluster = plan.cluster,
                .dependent = x.device.clusters};
  };
  Status status = allow(kernel, x.device, plan);
  // Large clusters need as many free multiprocessors next to each other: halved until all row sets run at once, as
  // long as the keys stay on chip, or until one cluster fits at all.
  while (status == cudaSuccess && plan.cluster > 1 && x.tuning.cluster == 0) {
    int active = 0;
    const LaunchConfig launch(grid_of(plan), stream);
    if (cudaOccupancyMaxActiveClusters(&active, kernel, &launch.config) != cudaSuccess) {
      active = 0;
      cudaGetLastError();
    }
    const Plan half = x.with_cluster(plan.cluster / 2);
    const bool spills = plan.on_chip > 0 && half.on_chip == 0;
    const bool waits = active < x.rows && plan.cluster > kPortableCluster && !spills;
    if (active > 0 && !waits) break;
    plan = half;
    status = allow(kernel, x.device, plan);
  }
  if (status != cudaSuccess) return status;
  return launch(kernel, grid_of(plan), stream, p, plan.on_chip);
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
Status run(const SelectParams& p, const Problem& x, void* scratch, Stream stream) {
  const Plan plan = make_plan(x);
  const auto typed = [&]<ScoreType type> {
    return plan.splits > 0 ? run_split<type, kBlock>(p, plan, scratch, stream)
                           : run_cluster<type, kBlock>(p, x, plan, stream);
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
  return scratch_of(make_plan({device, rows, longest, tuning}), rows);
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
  const Problem problem = {device, rows, longest, tuning};
  return problem.block() == kTestBlock ? run<kTestBlock>(p, problem, scratch, stream)
                                       : run<kBlock>(p, problem, scratch, stream);
}

Status select(const SelectParams& p, int64_t longest, void* scratch, Stream stream) {
  return select(p, longest, scratch, stream, {});
}

}  // namespace lkv::cuda
