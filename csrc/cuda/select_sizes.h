#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "lkv/keys.h"

// How a select is launched on clusters of blocks: sizes from the device's limits, clusters from what the device can
// hold. Plain C++: the launchers ask it, and so does bench/prediction.py, for cards that are not there.

namespace lkv::cuda {

inline constexpr int kSelectBlock = 512;
inline constexpr int kSelectWarps = kSelectBlock / 32;
inline constexpr int kMaxCluster = 16;
inline constexpr int kPortableCluster = 8;       // more than this must be allowed per kernel
inline constexpr int64_t kShortPart = 128;       // keys per warp below which more blocks cost more than they save
inline constexpr int64_t kOneBlock = 256;        // the same of one block, which meets no other
inline constexpr int64_t kShortRow = 16384;      // up to which keys stay in registers, if it takes a cluster
inline constexpr int64_t kForGather = 16 << 10;  // shared memory left to the blocks of a gather that runs beside
inline constexpr int64_t kSelectShared = 20784;  // of a block besides its keys; compared with the struct where it is

// The tokens that compete are cut, in order, into one run per block and each run into one part per warp. Parts are
// whole warp tiles.
inline constexpr uint32_t kWarpTile = 128;
inline constexpr int kRegisterTiles = 2;  // that a warp keeps in registers

LKV_HD uint32_t keys_per_warp(uint32_t count, uint32_t warps) {
  return ((count + warps - 1) / warps + kWarpTile - 1) / kWarpTile * kWarpTile;
}

enum class KeysIn { shared, registers };

// One cluster of `cluster` blocks per segment.
struct Plan {
  int block = kSelectBlock, cluster = 1;
  KeysIn keys_in = KeysIn::shared;
  uint32_t warp_capacity = 0;  // keys of a warp in shared memory
  bool on_chip = false;        // all of them
  size_t shared = 0;
};

// What a plan is made from.
struct SelectSizes {
  int64_t rows, longest;
  int64_t multiprocessors, shared_per_block;  // of the device
  bool has_clusters = true;
  int64_t fixed = kSelectShared;  // shared memory of a block besides its keys
  int block = kSelectBlock;
  // Choices made by the caller, see Tuning.
  int cluster = 0, resident = -1, registers = -1;

  int warps() const { return block / 32; }
  // Keys of one warp.
  int64_t part(int cluster) const { return keys_per_warp(static_cast<uint32_t>(longest), cluster * warps()); }
  // How many of them it could hold.
  int64_t in_shared() const {
    return whole_tiles((shared_per_block - kForGather - fixed) / static_cast<int64_t>(warps() * sizeof(uint32_t)));
  }
  int64_t in_registers() const { return registers == 0 ? 0 : whole_tiles(kRegisterTiles * kWarpTile); }
  int64_t whole_tiles(int64_t keys) const {
    if (resident >= 0) keys = std::min<int64_t>(keys, resident);
    return keys / kWarpTile * kWarpTile;
  }

  Plan with_cluster(int cluster) const {
    Plan plan = {.block = block, .cluster = cluster};
    const int64_t keys = part(cluster), kept = std::min(keys, in_shared());
    if (keys <= in_registers()) {
      plan.keys_in = KeysIn::registers;
      plan.on_chip = true;
    } else {
      plan.warp_capacity = static_cast<uint32_t>(kept);
      plan.on_chip = kept == keys;
    }
    plan.shared = fixed + plan.warp_capacity * warps() * sizeof(uint32_t);
    return plan;
  }
};

// Blocks are added to a segment until its keys fit on chip, and further while multiprocessors would idle.
inline Plan plan_clusters(const SelectSizes& x) {
  if (!x.has_clusters) return x.with_cluster(1);
  if (x.cluster > 0) return x.with_cluster(x.cluster);
  int cluster = 1;
  const int64_t fits = x.longest <= kShortRow && x.in_registers() > 0 ? x.in_registers() : x.in_shared();
  const auto idle = [&] {
    return x.part(cluster) > (cluster == 1 ? kOneBlock : kShortPart) && x.rows * cluster * 2 <= x.multiprocessors;
  };
  const auto spills = [&] { return x.part(cluster) > fits; };
  while (cluster < kMaxCluster && (spills() || idle())) cluster *= 2;
  return x.with_cluster(cluster);
}

// Large clusters are halved until all segments run at once, as long as the keys stay on chip, or until one cluster fits
// at all. `active_of(plan)`: how many clusters run at once; -1, which ends the search: the device does not answer.
// Returns that of the plan.
template <class ActiveOf>
int64_t settle(const SelectSizes& x, Plan& plan, ActiveOf&& active_of) {
  int64_t active = active_of(plan);
  while (active >= 0 && plan.cluster > 1) {
    const Plan half = x.with_cluster(plan.cluster / 2);
    const bool spills = plan.on_chip && !half.on_chip;
    const bool waits = active < x.rows && plan.cluster > kPortableCluster && !spills;
    if (x.cluster > 0 || (active > 0 && !waits)) break;
    plan = half;
    active = active_of(plan);
  }
  return active;
}

// The clusters of a launch: no more than run at once, and than `per_multiprocessor` blocks for each multiprocessor.
inline int64_t clusters_of(const SelectSizes& x, const Plan& plan, int64_t active, int64_t per_multiprocessor) {
  const int64_t wanted = x.multiprocessors * per_multiprocessor / plan.cluster;
  return std::min(x.rows, std::max<int64_t>(std::min(wanted, active), 1));
}

}  // namespace lkv::cuda
