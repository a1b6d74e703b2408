#pragma once

#include "select_pivot.cuh"

// Select with several independent blocks per segment, for few long segments where clusters do not exist. The steps are
// those of select_cluster.cuh, but each is a grid of its own, and blocks exchange counts in global memory, so no block
// ever waits for another:
//   1. Two or three grids of histograms, one for each digit. Every block finds the pivot so far again from the sums.
//   2. A grid that counts, for every warp, the keys above the pivot and equal to it.
//   3. A grid that writes the positions; the last block of a segment sets its flag.

namespace lkv::cuda {

// Zero before the first round; one per segment.
struct alignas(16) SplitRow {
  uint32_t histograms[3][kBins];
  uint32_t done;  // blocks that have written their positions
};

struct Split {
  SplitRow* rows;   // [R]
  Counts* counts;   // [R][blocks of a segment][warps]
  uint32_t blocks;  // per segment
};

template <int kBlock>
struct SplitShared {
  uint32_t histogram[kBins];
  RowPlan plan;
  PivotSearch<kBlock> search;
};

// The pivot after `rounds` rounds, found again by every block that needs it.
template <ScoreType type, int kBlock>
__device__ __forceinline__ Pivot pivot_after(SplitShared<kBlock>* shared, const SplitRow& row, const RowPlan& plan,
                                             int rounds) {
  Pivot pivot = first_pivot(plan.wanted);
  for (int round = 0; round < rounds && !pivot.exact; ++round) {
    const auto four = [&](uint32_t bin) { return *reinterpret_cast<const uint4*>(&row.histograms[round][bin]); };
    pivot = shared->search.next(four, pivot, round, kRounds<type>);
  }
  return pivot;
}

template <ScoreType type, int kBlock>
__global__ void __launch_bounds__(kBlock, kResidentThreads / kBlock)
    split_histogram_kernel(const LKV_GRID_CONSTANT SelectParams p, const Split split, const int round) {
  auto* shared = dyn_smem<SplitShared<kBlock>>();
  const int64_t row = blockIdx.x / split.blocks;
  const RowPlan& plan = share_plan(&shared->plan, p, row);
  if (plan.decided()) return;
  const Pivot pivot = pivot_after<type>(shared, split.rows[row], plan, round);
  if (pivot.exact) return;
  const Slice slice = slice_of<kBlock>(plan, blockIdx.x % split.blocks, split.blocks);
  StreamedKeys<type> keys = {Scores<type>(plan, slice)};
  clear_histogram(shared->histogram);
  count_digits(keys, slice, pivot, round, shared->histogram);
  block_sync();
  for (uint32_t bin = threadIdx.x; bin < kBins; bin += kBlock) {
    const uint32_t count = shared->histogram[bin];
    if (count > 0) atomicAdd(&split.rows[row].histograms[round][bin], count);
  }
}

template <ScoreType type, int kBlock>
__global__ void __launch_bounds__(kBlock, kResidentThreads / kBlock)
    split_count_kernel(const LKV_GRID_CONSTANT SelectParams p, const Split split) {
  constexpr uint32_t warps = kBlock / kWarp;
  const int64_t row = blockIdx.x / split.blocks;
  auto* shared = dyn_smem<SplitShared<kBlock>>();
  const RowPlan& plan = share_plan(&shared->plan, p, row);
  if (plan.decided()) return;
  const Pivot pivot = pivot_after<type>(shared, split.rows[row], plan, kRounds<type>);
  const Slice slice = slice_of<kBlock>(plan, blockIdx.x % split.blocks, split.blocks);
  const Counts counts = count_slice(StreamedKeys<type>{Scores<type>(plan, slice)}, slice, pivot);
  if (lane_id() == 0) split.counts[int64_t{blockIdx.x} * warps + warp_id()] = counts;
}

template <ScoreType type, int kBlock>
__global__ void __launch_bounds__(kBlock, kResidentThreads / kBlock)
    split_emit_kernel(const LKV_GRID_CONSTANT SelectParams p, const Split split) {
  trigger_dependents();
  constexpr uint32_t warps = kBlock / kWarp;
  const int64_t row = blockIdx.x / split.blocks;
  const uint32_t block = blockIdx.x % split.blocks;
  auto* shared = dyn_smem<SplitShared<kBlock>>();
  const RowPlan& plan = share_plan(&shared->plan, p, row);
  if (!plan.decided()) {
    const Pivot pivot = pivot_after<type>(shared, split.rows[row], plan, kRounds<type>);
    const Slice slice = slice_of<kBlock>(plan, block, split.blocks);
    const Counts* counts = split.counts + row * split.blocks * warps;
    Counts before = 0;
    for (uint32_t i = lane_id(); i < block * warps + warp_id(); i += kWarp) before += counts[i];
    emit_slice(StreamedKeys<type>{Scores<type>(plan, slice)}, slice, pivot, warp_sum(before), plan.begin + plan.sink,
               p.positions + plan.out + plan.sink);
  }
  emit_decided(p, plan, row, int64_t{block} * kBlock + threadIdx.x, int64_t{split.blocks} * kBlock);
  if (p.ready != nullptr) {
    block_sync();
    const bool last = threadIdx.x == 0 && add_acquire_release(&split.rows[row].done, 1) + 1 == split.blocks;
    if (last) store_release(&p.ready[row], 1);
  }
}

}  // namespace lkv::cuda
