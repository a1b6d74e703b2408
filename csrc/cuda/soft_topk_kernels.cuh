#pragma once

#include "soft_topk_row.cuh"

// From scores to the mask, with a cluster of blocks per row:
//   1. Each block reads its slice of the row once, keeps it in shared memory if it fits, and sums up count, range, mean
//      and variance of the finite scores.
//   2. One thread decides rows in which k leaves no choice, or guesses tau from these sums (lkv/soft_threshold.h).
//   3. Passes over the slice: every thread sums the mask and its derivatives at tau, blocks and cluster add up, and one
//      thread of each block moves tau, by the same arithmetic in all blocks, until the mask sums up to k.
//   4. Write the mask, or its logarithm, and the weight of the row.

namespace lkv::cuda {

// What a pass needs of tau, in two parts so that differences near it are exact.
struct SoftTau {
  float high, shift, inverse;
};

template <int kBlock>
struct SoftShared {
  RowTotals<kBlock> totals;
  SoftPlan plan;
  Threshold threshold;
  SoftTau tau;
  int state;       // of the threshold; kDecided where there is none
  float constant;  // of a decided row
  float least_weight;

  static constexpr int kDecided = -1;

  // The block's scores follow.
  __device__ float* scores() { return reinterpret_cast<float*>(this + 1); }
};

// At one score: e = e^-u, m = 1 / (1 + e), and rest = 1 - m without cancellation.
struct SoftPoint {
  float u, e, m, rest;

  __device__ __forceinline__ SoftPoint(float score, const SoftTau& tau) {
    u = fmaf(score - tau.high, tau.inverse, tau.shift);
    e = expf(-(u < kFarthest ? u > -kFarthest ? u : -kFarthest : kFarthest));
    const float inverse = reciprocal(1.0f + e);
    rest = e * inverse;
    m = u > -kFarthest ? inverse : 0.0f;
  }

  __device__ __forceinline__ float log() const { return u > -kFarthest ? u < kFarthest ? -log1pf(e) : 0.0f : u; }
};

template <ScoreType type>
struct SoftScores {
  using Bits = typename ScoreTraits<type>::Bits;
  const char* row;
  float* on_chip;  // of the block's slice; nullptr: not kept
  int begin;

  // NaN counts as -inf.
  __device__ __forceinline__ float load(int i) const {
    const float score = to_float<type>(reinterpret_cast<const Bits*>(row)[i]);
    return score >= -kLargest ? score : -INFINITY;
  }
  __device__ __forceinline__ float operator[](int i) const { return on_chip ? on_chip[i - begin] : load(i); }
};

template <int kBlock>
__device__ __forceinline__ void split_tau(SoftShared<kBlock>* shared) {
  const double tau = shared->threshold.tau, inverse = shared->plan.inverse;
  const float high = static_cast<float>(tau);
  shared->tau = {high, static_cast<float>((static_cast<double>(high) - tau) * inverse), static_cast<float>(inverse)};
}

// What one thread does between passes.
template <int kBlock>
__device__ __forceinline__ void start_threshold(SoftShared<kBlock>* shared, float origin, bool log) {
  const SoftPlan& plan = shared->plan;
  double sums[6];
  shared->totals.template read<2>(sums);
  const SoftRange range = {
      -sums[0], sums[1], sums[2], sums[3], origin, static_cast<int64_t>(sums[4]), static_cast<int64_t>(sums[5])};
  if (Threshold::decided(range, plan.k)) {
    const bool kept = plan.k > sums[5];
    shared->state = SoftShared<kBlock>::kDecided;
    shared->constant = kept ? log ? 0.0f : 1.0f : log ? static_cast<float>(kLogFloor) : 0.0f;
    return;
  }
  shared->threshold.start(range, plan.n, plan.k, plan.temperature);
  shared->state = Threshold::far;
  shared->least_weight = static_cast<float>(kLeastWeight * sums[4]);
  split_tau(shared);
}

template <int kBlock>
__device__ __forceinline__ void step_threshold(SoftShared<kBlock>* shared) {
  double sums[4];
  shared->totals.template read<0>(sums);
  shared->state = shared->threshold.step({sums[0], sums[1], sums[2], sums[3], true}, soft_precision(false));
  split_tau(shared);
}

template <ScoreType type, int kBlock>
__device__ __forceinline__ SoftScores<type> scores_of(SoftShared<kBlock>* shared, const SoftTopkParams& p,
                                                      int on_chip) {
  const SoftPlan& plan = shared->plan;
  return {p.scores + plan.place_offset, plan.end - plan.begin <= on_chip ? shared->scores() : nullptr, plan.begin};
}

// Reads the slice. Then one thread knows the range of the row, and where to look for tau.
template <ScoreType type, int kBlock>
__device__ __forceinline__ void read_scores(SoftShared<kBlock>* shared, const SoftTopkParams& p, int on_chip) {
  const SoftScores<type> scores = scores_of<type>(shared, p, on_chip);
  const SoftPlan& plan = shared->plan;
  const float first = plan.n > 0 ? scores.load(0) : 0.0f;
  const float origin = first >= -kLargest && first <= kLargest ? first : 0.0f;
  float parts[6] = {-INFINITY, -INFINITY, 0, 0, 0, 0};  // -lowest, highest, sum, squares, finite, infinite
#pragma unroll 2
  for (int i = plan.begin + static_cast<int>(threadIdx.x); i < plan.end; i += kBlock) {
    const float score = scores.load(i);
    if (scores.on_chip != nullptr) scores.on_chip[i - plan.begin] = score;
    const bool finite = score >= -kLargest && score <= kLargest;
    const float offset = finite ? score - origin : 0.0f;
    parts[0] = fmaxf(parts[0], finite ? -score : -INFINITY);
    parts[1] = fmaxf(parts[1], finite ? score : -INFINITY);
    parts[2] += offset;
    parts[3] = fmaf(offset, offset, parts[3]);
    parts[4] += finite ? 1.0f : 0.0f;
    parts[5] += score > kLargest ? 1.0f : 0.0f;
  }
  shared->totals.template exchange<2>(parts);
  if (threadIdx.x == 0) start_threshold(shared, origin, p.rows.log);
}

// Passes over the slice until tau is near.
template <ScoreType type, int kBlock>
__device__ __forceinline__ void find_tau(SoftShared<kBlock>* shared, const SoftTopkParams& p, int on_chip) {
  const SoftPlan& plan = shared->plan;
  for (int step = 0; step < kSoftSteps; ++step) {
    block_sync();
    if (shared->state != Threshold::far) return;
    const SoftScores<type> scores = scores_of<type>(shared, p, on_chip);
    const SoftTau tau = shared->tau;
    float parts[4] = {};  // m, rest, w, tilt
#pragma unroll 4
    for (int i = plan.begin + static_cast<int>(threadIdx.x); i < plan.end; i += kBlock) {
      const SoftPoint x(scores[i], tau);
      const float w = x.m * x.rest;
      parts[0] += x.m;
      parts[1] += x.rest;
      parts[2] += w;
      parts[3] = fmaf(w, x.rest - x.m, parts[3]);
    }
    shared->totals.template exchange<0>(parts);
    if (threadIdx.x == 0) step_threshold(shared);
  }
  block_sync();
}

template <ScoreType type, int kBlock>
__device__ __forceinline__ void write_mask(SoftShared<kBlock>* shared, const SoftTopkParams& p, int on_chip,
                                           uint32_t row) {
  const SoftScores<type> scores = scores_of<type>(shared, p, on_chip);
  const SoftPlan& plan = shared->plan;
  const bool log = p.rows.log, decided = shared->state == SoftShared<kBlock>::kDecided;
  const float constant = shared->constant, missing = log ? -INFINITY : 0.0f, whole = log ? 0.0f : 1.0f;
  const SoftTau tau = shared->tau;
  float* mask = static_cast<float*>(p.mask) + int64_t{row} * p.rows.length;
#pragma unroll 4
  for (int i = plan.begin + static_cast<int>(threadIdx.x); i < plan.end; i += kBlock) {
    const float score = scores[i];
    if (decided) {
      mask[i] = score >= -kLargest ? score > kLargest ? whole : constant : missing;
    } else {
      const SoftPoint x(score, tau);
      mask[i] = log ? x.log() : x.m;
    }
  }
  const int64_t first = int64_t{SoftCluster::rank()} * kBlock + threadIdx.x;
  for (int64_t i = plan.n + first; i < p.rows.length; i += int64_t{SoftCluster::size()} * kBlock) mask[i] = missing;
  if (first == 0) {
    const float weight = static_cast<float>(shared->threshold.weight);
    static_cast<float*>(p.weights)[row] = decided ? 0.0f : fmaxf(weight, shared->least_weight);
  }
}

// `on_chip`: the scores that a block has shared memory for.
template <ScoreType type, int kBlock>
__global__ void __launch_bounds__(kBlock, kSoftThreads / kBlock)
    soft_topk_kernel(const LKV_GRID_CONSTANT SoftTopkParams p, const int on_chip) {
  auto* shared = dyn_smem<SoftShared<kBlock>>();
  if (threadIdx.x == 0) shared->totals.round = 0;
  const auto rows = static_cast<uint32_t>(p.rows.count());
  for (uint32_t row = blockIdx.x / SoftCluster::size(); row < rows; row += gridDim.x / SoftCluster::size()) {
    plan_row(shared, p.rows, &p.strides, row);
    read_scores<type>(shared, p, on_chip);
    find_tau<type>(shared, p, on_chip);
    write_mask<type>(shared, p, on_chip, row);
    // The plan may go, and no peer reads this block's totals any more.
    SoftCluster::sync();
  }
}

}  // namespace lkv::cuda
