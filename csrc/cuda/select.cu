#include "select_plan.h"
#include "select_split.cuh"

namespace lkv::cuda {
namespace {

constexpr int kMaxSplits = 64;

// One stands for all: they are compiled together, and scratch is sized before the type of the scores is known.
Status device_of(Device& out) {
  return Device::of(select_kernel<ScoreType::f32, kSelectBlock, KeysIn::shared>, out);
}

// Independent blocks per segment; 0: one cluster instead.
int choose_splits(const SelectSizes& x, const Tuning& tuning) {
  if (tuning.splits >= 0) return tuning.splits;
  if (x.has_clusters || x.part(1) <= x.in_shared() || x.rows * 2 > x.multiprocessors) return 0;
  return static_cast<int>(std::clamp<int64_t>(2 * x.multiprocessors / x.rows, 2, kMaxSplits));
}

template <ScoreType type, int kBlock>
Status run_clusters(const SelectParams& p, const Device& device, const SelectSizes& x, Stream stream) {
  const auto kernel_of = [](const Plan& plan) {
    return plan.keys_in == KeysIn::registers ? select_kernel<type, kBlock, KeysIn::registers>
                                             : select_kernel<type, kBlock, KeysIn::shared>;
  };
  // Where a gather can start meanwhile, which waits for the flags, it gets the other half of every multiprocessor.
  const bool shares = p.ready != nullptr && device.clusters;
  const int blocks = shares ? 1 : kResidentThreads / kBlock;
  return launch_clusters(kernel_of, device, x, plan_clusters(x), blocks, stream, p);
}

template <ScoreType type, int kBlock>
Status run_split(const SelectParams& p, int splits, void* scratch, Stream stream) {
  const int64_t rows = p.source.rows();
  auto* split_rows = static_cast<SplitRow*>(scratch);
  const Split split = {split_rows, reinterpret_cast<Counts*>(split_rows + rows), static_cast<uint32_t>(splits)};
  const Grid grid = {.blocks = rows * splits, .block = kBlock, .shared = sizeof(SplitShared<kBlock>)};
  Status status = cudaMemsetAsync(split_rows, 0, rows * sizeof(SplitRow), stream);
  for (int round = 0; round < kRounds<type> && status == cudaSuccess; ++round) {
    status = launch(split_histogram_kernel<type, kBlock>, grid, stream, p, split, round);
  }
  if (status == cudaSuccess) status = launch(split_count_kernel<type, kBlock>, grid, stream, p, split);
  if (status == cudaSuccess) status = launch(split_emit_kernel<type, kBlock>, grid, stream, p, split);
  return status;
}

template <int kBlock>
Status run(const SelectParams& p, const Device& device, const SelectSizes& x, int splits, void* scratch,
           Stream stream) {
  return with_type(p.type, [&]<ScoreType type> {
    return splits > 0 ? run_split<type, kBlock>(p, splits, scratch, stream)
                      : run_clusters<type, kBlock>(p, device, x, stream);
  });
}

}  // namespace

size_t select_scratch(int64_t rows, int64_t longest, const Tuning& tuning) {
  Device device;
  if (rows == 0 || device_of(device) != cudaSuccess) return 0;
  const SelectSizes x = sizes_of(device, rows, longest, tuning);
  const size_t splits = choose_splits(x, tuning);
  return splits == 0 ? 0 : rows * (sizeof(SplitRow) + splits * x.warps() * sizeof(Counts));
}

size_t select_scratch(int64_t rows, int64_t longest) {
  return select_scratch(rows, longest, {});
}

Status select(const SelectParams& p, int64_t longest, void* scratch, Stream stream, const Tuning& tuning) {
  const int64_t rows = p.source.rows();
  if (rows == 0) return cudaMemsetAsync(p.positions, 0xff, p.total * sizeof(int32_t), stream);
  Device device;
  const Status status = device_of(device);
  if (status != cudaSuccess) return status;
  const SelectSizes x = sizes_of(device, rows, longest, tuning);
  const int splits = choose_splits(x, tuning);
  return with_block<kSelectBlock>(tuning,
                                  [&]<int kBlock> { return run<kBlock>(p, device, x, splits, scratch, stream); });
}

Status select(const SelectParams& p, int64_t longest, void* scratch, Stream stream) {
  return select(p, longest, scratch, stream, {});
}

}  // namespace lkv::cuda
