#include "launch.h"
#include "soft_topk_grad.cuh"
#include "soft_topk_kernels.cuh"
#include "tuning.h"

namespace lkv::cuda {
namespace {

constexpr int kProductionBlock = 512;
constexpr int64_t kShortSlice = 4096;  // items per block below which more blocks cost more than they save

// A kernel, the shared memory that it needs and what it takes per item of its slice.
template <class Params>
struct SoftLaunch {
  void (*kernel)(Params, int);
  int block;
  size_t fixed, item;

  Status operator()(const Params& p, Stream stream, const Tuning& tuning) const {
    const int64_t rows = p.rows.count();
    if (rows == 0) return cudaSuccess;
    Device device;
    Status status = Device::of(kernel, device);
    if (status != cudaSuccess) return status;
    if (std::max(p.rows.length, rows) > kMaxBlocks) return cudaErrorInvalidValue;
    int64_t fits = (device.shared_per_block - static_cast<int64_t>(fixed)) / static_cast<int64_t>(item);
    if (tuning.resident >= 0) fits = std::min<int64_t>(fits, tuning.resident);
    const auto slice = [&](int cluster) { return (p.rows.length + cluster - 1) / cluster; };
    // Blocks are added to a row until it fits on chip, and further while multiprocessors would idle.
    int cluster = device.clusters ? std::max(tuning.cluster, 1) : 1;
    while (device.clusters && tuning.cluster == 0 && cluster < kPortableCluster &&
           (slice(cluster) > fits || (slice(cluster) > kShortSlice && rows * cluster * 2 <= device.multiprocessors))) {
      cluster *= 2;
    }
    for (;; cluster /= 2) {
      const int64_t on_chip = slice(cluster) <= fits ? slice(cluster) : 0;
      const Grid grid = {.blocks = std::min(rows, kMaxBlocks / cluster) * cluster,
                         .block = block,
                         .shared = fixed + static_cast<size_t>(on_chip) * item,
                         .cluster = cluster};
      int64_t active = 0;
      status = allow(kernel, grid, device, active);
      if (status != cudaSuccess) return status;
      if (active > 0) return launch(kernel, grid, stream, p, static_cast<int>(on_chip));
    }
  }
};

template <ScoreType type, int kBlock>
Status run(const SoftTopkParams& p, Stream stream, const Tuning& tuning) {
  const SoftLaunch<SoftTopkParams> launch = {soft_topk_kernel<type, kBlock>, kBlock, sizeof(SoftShared<kBlock>),
                                             sizeof(float)};
  return launch(p, stream, tuning);
}

template <ScoreType type, int kBlock>
Status run_grad(const SoftTopkGradParams& p, Stream stream, const Tuning& tuning) {
  const SoftLaunch<SoftTopkGradParams> launch = {soft_topk_grad_kernel<type, kBlock>, kBlock,
                                                 sizeof(SoftGradShared<kBlock>), sizeof(float2)};
  return launch(p, stream, tuning);
}

}  // namespace

Status soft_topk(const SoftTopkParams& p, Stream stream, const Tuning& tuning) {
  if (p.rows.wide) return cudaErrorInvalidValue;
  return with_type(p.rows.type, [&]<ScoreType type> {
    return with_block<kProductionBlock>(tuning, [&]<int kBlock> { return run<type, kBlock>(p, stream, tuning); });
  });
}

Status soft_topk(const SoftTopkParams& p, Stream stream) {
  return soft_topk(p, stream, {});
}

Status soft_topk_grad(const SoftTopkGradParams& p, Stream stream, const Tuning& tuning) {
  if (p.rows.wide) return cudaErrorInvalidValue;
  return with_type(p.rows.type, [&]<ScoreType type> {
    return with_block<kProductionBlock>(tuning, [&]<int kBlock> { return run_grad<type, kBlock>(p, stream, tuning); });
  });
}

Status soft_topk_grad(const SoftTopkGradParams& p, Stream stream) {
  return soft_topk_grad(p, stream, {});
}

}  // namespace lkv::cuda
