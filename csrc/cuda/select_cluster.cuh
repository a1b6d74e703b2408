#pragma once

#include "select_pivot.cuh"

// Select with one cluster of blocks per segment. Before sm_90 a cluster is one block.
//   1. One thread of each block plans the segment: sink and window are known, the tokens between compete
//      (selection_of). Those tokens are cut into one slice per warp of the cluster.
//   2. Each warp reads its scores once and keeps them as ordered keys in registers or shared memory, as many as fit.
//   3. Radix search for the last key kept, 11, 11 and 10 bits at a time: the block counts its keys by their next digit,
//      adds the counts to those of the cluster over distributed shared memory, and finds the digit of the pivot in the
//      sums.
//   4. Each warp counts its keys above the pivot and equal to it. The counts of the slices before say where it writes.
//   5. Each warp writes the positions of its slice in order: no sort, no atomics.
//   6. The cluster writes sink, window and slack, meets, and sets the flag of the segment: a gather may move its rows.
// Clusters walk the segments, so that the grid has no more blocks than run at once.

namespace lkv::cuda {

template <int kBlock>
struct ClusterShared {
  alignas(16) uint32_t histogram[kBins];    // of this block
  alignas(16) uint32_t sums[3][kBins / 2];  // over the cluster, of the bins that this block owns; in turn
  RowPlan plan;
  PivotSearch<kBlock> search;
  Counts warp_counts[kBlock / kWarp];
  Counts block_counts;

  // The warps' keys follow.
  __device__ uint32_t* keys() { return reinterpret_cast<uint32_t*>(this + 1); }
};

// The logarithm of a cluster's size, which is a power of two: shifts are faster than divisions.
__device__ __forceinline__ uint32_t logarithm(uint32_t power) {
  return __popc(power - 1);
}

struct Cluster {
  uint32_t rank = cluster_rank(), size = cluster_size();
  uint32_t shift = logarithm(size);
  uint32_t turn = 0;  // which of `sums` is next

  __device__ __forceinline__ void sync() const {
    if (size > 1) {
      cluster_sync();
    } else {
      block_sync();
    }
  }

  // The sum of a bin: which block owns it, and where it lies there. Bins go round in runs of a warp's width, as those
  // that are hit lie next to each other.
  __device__ __forceinline__ uint32_t* sum_of(uint32_t* sums, uint32_t bin) const {
    const uint32_t run = bin / kWarp;
    return map_shared_rank(&sums[(run >> shift) * kWarp + bin % kWarp], run & (size - 1));
  }
};

// All blocks are there, and their first `sums` are zero.
template <int kBlock>
__device__ __forceinline__ void meet(ClusterShared<kBlock>* shared, const Cluster& cluster) {
  if (cluster.size == 1) return;
  for (uint32_t i = threadIdx.x; i < kBins / 2; i += kBlock) shared->sums[0][i] = 0;
  cluster.sync();
}

// The histograms summed over the cluster: every block owns a share of the bins and all add what they have to it, which
// is little, as most bins are empty. One barrier does: the sums of the next turn are cleared before it, and those of
// the turn before are read no more.
template <int kBlock>
__device__ __forceinline__ void sum_histograms(ClusterShared<kBlock>* shared, Cluster& cluster) {
  block_sync();
  if (cluster.size == 1) return;
  const uint32_t share = kBins >> cluster.shift, next = cluster.turn == 2 ? 0 : cluster.turn + 1;
  uint32_t* sums = shared->sums[cluster.turn];
  for (uint32_t i = threadIdx.x; i < share; i += kBlock) shared->sums[next][i] = 0;
  for (uint32_t bin = 4 * threadIdx.x; bin < kBins; bin += 4 * kBlock) {
    const uint4 counts = *reinterpret_cast<const uint4*>(&shared->histogram[bin]);
    uint32_t* sum = cluster.sum_of(sums, bin);
    if (counts.x > 0) atomicAdd(sum, counts.x);
    if (counts.y > 0) atomicAdd(sum + 1, counts.y);
    if (counts.z > 0) atomicAdd(sum + 2, counts.z);
    if (counts.w > 0) atomicAdd(sum + 3, counts.w);
  }
  cluster.sync();
}

// Counts of bin .. bin + 3 over the cluster.
template <int kBlock>
__device__ __forceinline__ uint4 four_bins(ClusterShared<kBlock>* shared, const Cluster& cluster, uint32_t bin) {
  if (cluster.size == 1) return *reinterpret_cast<const uint4*>(&shared->histogram[bin]);
  return *reinterpret_cast<const uint4*>(cluster.sum_of(shared->sums[cluster.turn], bin));
}

// What the slices before this warp's hold, over the cluster.
template <int kBlock>
__device__ __forceinline__ Counts counts_before(ClusterShared<kBlock>* shared, const Cluster& cluster, Counts mine) {
  const int lane = lane_id();
  if (lane == 0) shared->warp_counts[warp_id()] = mine;
  block_sync();
  if (cluster.size > 1) {
    if (warp_id() == 0) {
      const Counts sum = warp_sum(lane < kBlock / kWarp ? shared->warp_counts[lane] : Counts{0});
      if (lane == 0) shared->block_counts = sum;
    }
    cluster.sync();
  }
  Counts before = lane < warp_id() ? shared->warp_counts[lane] : 0;
  if (static_cast<uint32_t>(lane) < cluster.rank) before += *map_shared_rank(&shared->block_counts, lane);
  return warp_sum(before);
}

// Writes the positions of one segment. All blocks of the cluster call it. After the next barrier of the cluster all
// positions are written, and no block reads the shared memory of another any more.
template <ScoreType type, int kBlock, KeysIn keys_in>
__device__ __forceinline__ void select_row(const SelectParams& p, int64_t row, uint32_t warp_capacity, Cluster& cluster,
                                           ClusterShared<kBlock>* shared) {
  const RowPlan& plan = share_plan(&shared->plan, p, row);
  if (!plan.decided()) {
    const Slice slice = slice_of<kBlock>(plan, cluster.rank, cluster.size);
    auto keys = [&] {
      const StreamedKeys<type> source = {Scores<type>(plan, slice)};
      if constexpr (keys_in == KeysIn::registers) {
        return RegisterKeys<type, kRegisterTiles>{source, {}};
      } else {
        return SharedKeys<type>{source, shared->keys() + warp_id() * warp_capacity, warp_capacity};
      }
    }();
    Pivot pivot = first_pivot(plan.wanted);
    for (int round = 0; round < kRounds<type> && !pivot.exact; ++round) {
      clear_histogram(shared->histogram);
      count_digits(keys, slice, pivot, round, shared->histogram);
      sum_histograms(shared, cluster);
      const auto four = [&](uint32_t bin) { return four_bins(shared, cluster, bin); };
      pivot = shared->search.next(four, pivot, round, kRounds<type>);
      cluster.turn = cluster.turn == 2 ? 0 : cluster.turn + 1;
    }
    const Counts before = counts_before(shared, cluster, count_slice(keys, slice, pivot));
    emit_slice(keys, slice, pivot, before, plan.begin + plan.sink, p.positions + plan.out + plan.sink);
  }
  emit_decided(p, plan, row, int64_t{cluster.rank} * kBlock + threadIdx.x, int64_t{cluster.size} * kBlock);
}

// `warp_capacity`: the keys that a warp has shared memory for.
template <ScoreType type, int kBlock, KeysIn keys_in>
__global__ void __launch_bounds__(kBlock, kResidentThreads / kBlock)
    select_kernel(const LKV_GRID_CONSTANT SelectParams p, const uint32_t warp_capacity) {
  auto* shared = dyn_smem<ClusterShared<kBlock>>();
  Cluster cluster;
  meet(shared, cluster);
  grid_dependency_wait();
  trigger_dependents();
  const int64_t rows = p.source.rows();
  for (int64_t row = blockIdx.x >> cluster.shift; row < rows; row += gridDim.x >> cluster.shift) {
    select_row<type, kBlock, keys_in>(p, row, warp_capacity, cluster, shared);
    cluster.sync();
    if (p.ready != nullptr && cluster.rank == 0 && threadIdx.x == 0) store_release(&p.ready[row], 1);
  }
}

}  // namespace lkv::cuda
