#pragma once

#include "launch.h"
#include "select_cluster.cuh"
#include "select_sizes.h"
#include "tuning.h"

// How a select is launched on the current device.

namespace lkv::cuda {

static_assert(sizeof(ClusterShared<kSelectBlock>) == kSelectShared && kWarpTile == 4 * kWarp);

inline SelectSizes sizes_of(const Device& device, int64_t rows, int64_t longest, const Tuning& tuning) {
  return with_block<kSelectBlock>(tuning, [&]<int kBlock> {
    return SelectSizes{.rows = rows,
                       .longest = longest,
                       .multiprocessors = device.multiprocessors,
                       .shared_per_block = device.shared_per_block,
                       .has_clusters = device.clusters,
                       .fixed = static_cast<int64_t>(sizeof(ClusterShared<kBlock>)),
                       .block = kBlock,
                       .cluster = tuning.cluster,
                       .resident = tuning.resident,
                       .registers = tuning.registers};
  });
}

// Launches kernel_of(plan), behind the spans, on clusters that walk the segments: no more than run at once, and than
// `per_multiprocessor` blocks for each, so that what follows may start beside them.
template <class KernelOf, class... Params>
Status launch_clusters(KernelOf&& kernel_of, const Device& device, const SelectSizes& x, Plan plan,
                       int per_multiprocessor, Stream stream, const Params&... params) {
  const auto grid_of = [&](const Plan& plan, int64_t clusters) {
    return Grid{.blocks = clusters * plan.cluster,
                .block = plan.block,
                .shared = plan.shared,
                .cluster = plan.cluster,
                .dependent = device.clusters};
  };
  Status status = cudaSuccess;
  const int64_t active = settle(x, plan, [&](const Plan& plan) -> int64_t {
    int64_t clusters = 0;
    status = allow(kernel_of(plan), grid_of(plan, 1), device, clusters);
    return status == cudaSuccess ? clusters : -1;
  });
  if (status != cudaSuccess) return status;
  const int64_t clusters = clusters_of(x, plan, active, per_multiprocessor);
  return launch(kernel_of(plan), grid_of(plan, clusters), stream, params..., plan.warp_capacity);
}

}  // namespace lkv::cuda
