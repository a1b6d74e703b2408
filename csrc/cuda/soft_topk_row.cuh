#pragma once

#include "block_scan.cuh"
#include "lkv/soft_threshold.h"
#include "lkv/soft_topk.h"

// Rows of soft_topk: a cluster of blocks per row, each with a slice of it that stays in shared memory where it fits.

namespace lkv::cuda {

// Registers are bounded so that this many threads share a multiprocessor.
inline constexpr int kSoftThreads = 1024;

inline constexpr float kFarthest = 87.0f;  // |u| beyond which m is 0 or 1
inline constexpr float kLargest = 3.402823466e38f;

struct DeviceMath {
  __device__ __forceinline__ static double inverse(double x) { return reciprocal(x); }
  // These only make a bracket and a guess: float is exact enough.
  __device__ __forceinline__ static double log(double x) {
    return static_cast<double>(logf(static_cast<float>(x > 1e-37 ? x < 1e37 ? x : 1e37 : 1e-37)));
  }
  __device__ __forceinline__ static double root(double x) {
    return x * static_cast<double>(rsqrtf(static_cast<float>(x)));
  }
};

using Threshold = SoftThreshold<DeviceMath>;

// Read again wherever it is needed: registers cost more.
struct SoftCluster {
  __device__ __forceinline__ static uint32_t rank() { return cluster_rank(); }
  __device__ __forceinline__ static uint32_t size() { return cluster_size(); }
  __device__ __forceinline__ static void sync() {
    if (size() > 1) {
      cluster_sync();
    } else {
      block_sync();
    }
  }
};

// Where the block's slice of a row lies, with k, temperature and length of the row.
struct SoftPlan {
  int n, begin, end;
  double k, temperature, inverse;  // 1 / temperature
  int64_t place_offset;            // bytes, in the scores
};

// Totals over the row: the first kHighest of `parts` are the highest of all threads, the rest are sums. Threads and
// blocks add up in their order. Two sets: a block may write the next while its peers read the last.
template <int kBlock>
struct RowTotals {
  static constexpr int kMost = 6, kWarps = kBlock / kWarp;
  double blocks[2][kMost];
  float warps[kWarps][kMost];
  uint32_t round;

  template <int kHighest, int kParts>
  __device__ __forceinline__ void exchange(const float (&parts)[kParts]) {
    static_assert(kParts <= kMost);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const float total = in_warp(parts[i], i < kHighest);
      if (lane_id() == 0) warps[warp_id()][i] = total;
    }
    block_sync();
    if (threadIdx.x < kParts) {
      const int i = threadIdx.x;
      double total = warps[0][i];
#pragma unroll 4
      for (int warp = 1; warp < kWarps; ++warp) total = join(i < kHighest, total, warps[warp][i]);
      blocks[round & 1][i] = total;
    }
    SoftCluster::sync();
  }

  // By one thread, after an exchange.
  template <int kHighest, int kParts>
  __device__ __forceinline__ void read(double (&totals)[kParts]) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      totals[i] = *map_shared_rank(&blocks[round & 1][i], 0);
#pragma unroll 1
      for (uint32_t peer = 1; peer < SoftCluster::size(); ++peer) {
        totals[i] = join(i < kHighest, totals[i], *map_shared_rank(&blocks[round & 1][i], peer));
      }
    }
    ++round;
  }

 private:
  __device__ __forceinline__ static float in_warp(float x, bool highest) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const float other = __shfl_sync(kFullWarp, x, lane_id() ^ step);
      x = highest ? fmaxf(x, other) : x + other;
    }
    return x;
  }
  __device__ __forceinline__ static double join(bool highest, double a, double b) {
    return highest ? (a > b ? a : b) : a + b;
  }
};

// One thread finds the row for the block.
template <class Shared>
__device__ __forceinline__ void plan_row(Shared* shared, const SoftRows& rows, const Place* strides, uint32_t row) {
  if (threadIdx.x == 0) {
    Place place;
#pragma unroll
    for (int axis = kLeading - 1; axis >= 0; --axis) {
      const auto size = static_cast<uint32_t>(rows.sizes[axis]);
      place[axis] = row % size;
      row /= size;
    }
    SoftPlan& plan = shared->plan;
    plan.n = static_cast<int>(rows.length_of(place));
    plan.k = rows.k.at(place);
    plan.temperature = rows.temperature_of(place);
    plan.inverse = reciprocal(plan.temperature);
    plan.place_offset = 0;
    if (strides != nullptr) {
#pragma unroll
      for (int axis = 0; axis < kLeading; ++axis) plan.place_offset += place[axis] * (*strides)[axis];
    }
    const uint32_t size = SoftCluster::size(), share = (static_cast<uint32_t>(plan.n) + size - 1) / size;
    plan.begin = static_cast<int>(clamp(int64_t{share} * SoftCluster::rank(), 0, plan.n));
    plan.end = static_cast<int>(clamp(int64_t{plan.begin} + share, 0, plan.n));
  }
  block_sync();
}

}  // namespace lkv::cuda
