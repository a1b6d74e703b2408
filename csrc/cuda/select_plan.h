#pragma once

#include "launch.h"
#include "select_cluster.cuh"
#include "tuning.h"

// How a select is launched: sizes from the limits of the device, clusters by how many of them run at once.

namespace lkv::cuda {

inline constexpr int kSelectBlock = 512;
inline constexpr int kMaxCluster = 16;
inline constexpr int64_t kShortPart = 256;       // keys per warp below which more blocks cost more than they save
inline constexpr int64_t kShortRow = 16384;      // up to which keys stay in registers, if it takes a cluster
inline constexpr int64_t kForGather = 16 << 10;  // shared memory left to the blocks of a gather that runs beside

// One cluster of `cluster` blocks per segment.
struct Plan {
  int block = kSelectBlock, cluster = 1;
  KeysIn keys_in = KeysIn::shared;
  uint32_t warp_capacity = 0;  // keys of a warp in shared memory
  bool on_chip = false;        // all of them
  size_t shared = 0;
};

// What a plan is made from.
struct SelectSize {
  const Device& device;
  int64_t rows, longest;
  const Tuning& tuning;
  size_t beside = 0;  // shared memory that the kernel has for something else

  int block() const {
    return with_block<kSelectBlock>(tuning, [&]<int kBlock> { return kBlock; });
  }
  int warps() const { return block() / kWarp; }

  size_t fixed() const {
    return beside + with_block<kSelectBlock>(tuning, [&]<int kBlock> { return sizeof(ClusterShared<kBlock>); });
  }

  // Keys of one warp.
  int64_t part(int cluster) const { return keys_per_warp(static_cast<uint32_t>(longest), cluster * warps()); }
  // How many of them it could hold.
  int64_t in_shared() const {
    const int64_t space = device.shared_per_block - kForGather - static_cast<int64_t>(fixed());
    return whole_tiles(space / static_cast<int64_t>(warps() * sizeof(uint32_t)));
  }
  int64_t in_registers() const { return tuning.registers == 0 ? 0 : whole_tiles(kRegisterTiles * kWarpTile); }
  int64_t whole_tiles(int64_t keys) const {
    if (tuning.resident >= 0) keys = std::min<int64_t>(keys, tuning.resident);
    return keys / kWarpTile * kWarpTile;
  }

  Plan with_cluster(int cluster) const {
    Plan plan = {.block = block(), .cluster = cluster};
    const int64_t keys = part(cluster), kept = std::min(keys, in_shared());
    if (keys <= in_registers()) {
      plan.keys_in = KeysIn::registers;
      plan.on_chip = true;
    } else {
      plan.warp_capacity = static_cast<uint32_t>(kept);
      plan.on_chip = kept == keys;
    }
    plan.shared = fixed() + plan.warp_capacity * warps() * sizeof(uint32_t);
    return plan;
  }
};

// Blocks are added to a segment until its keys fit on chip, and further while multiprocessors would idle.
inline Plan plan_clusters(const SelectSize& x) {
  if (!x.device.clusters) return x.with_cluster(1);
  if (x.tuning.cluster > 0) return x.with_cluster(x.tuning.cluster);
  int cluster = 1;
  const int64_t fits = x.longest <= kShortRow && x.in_registers() > 0 ? x.in_registers() : x.in_shared();
  const auto idle = [&] { return x.part(cluster) > kShortPart && x.rows * cluster * 2 <= x.device.multiprocessors; };
  const auto spills = [&] { return x.part(cluster) > fits; };
  while (cluster < kMaxCluster && (spills() || idle())) cluster *= 2;
  return x.with_cluster(cluster);
}

// Launches kernel_of(plan), behind the spans, on clusters that walk the segments: no more than run at once, and than
// `per_multiprocessor` blocks for each, so that what follows may start beside them.
template <class KernelOf, class... Params>
Status launch_clusters(KernelOf&& kernel_of, const SelectSize& x, Plan plan, int per_multiprocessor, Stream stream,
                       const Params&... params) {
  const auto grid_of = [&](const Plan& plan, int64_t clusters) {
    return Grid{.blocks = clusters * plan.cluster,
                .block = plan.block,
                .shared = plan.shared,
                .cluster = plan.cluster,
                .dependent = x.device.clusters};
  };
  int64_t active = 0;
  Status status = allow(kernel_of(plan), grid_of(plan, 1), x.device, active);
  // Large clusters are halved until all segments run at once, as long as the keys stay on chip, or until one cluster
  // fits at all.
  while (status == cudaSuccess && plan.cluster > 1) {
    const Plan half = x.with_cluster(plan.cluster / 2);
    const bool spills = plan.on_chip && !half.on_chip;
    const bool waits = active < x.rows && plan.cluster > kPortableCluster && !spills;
    if (x.tuning.cluster > 0 || (active > 0 && !waits)) break;
    plan = half;
    status = allow(kernel_of(plan), grid_of(plan, 1), x.device, active);
  }
  if (status != cudaSuccess) return status;
  const int64_t wanted = int64_t{x.device.multiprocessors} * per_multiprocessor / plan.cluster;
  const int64_t clusters = std::min(x.rows, std::max<int64_t>(std::min(wanted, active), 1));
  return launch(kernel_of(plan), grid_of(plan, clusters), stream, params..., plan.warp_capacity);
}

}  // namespace lkv::cuda
