#pragma once

#include "soft_topk_row.cuh"

// From the gradient of a mask to those of what made it: one pass that reads both, one that writes.

namespace lkv::cuda {

template <int kBlock>
struct SoftGradShared {
  RowTotals<kBlock> totals;
  SoftPlan plan;
  float mean, inverse;  // dL/dk, 1 / temperature

  // The block's slopes follow.
  __device__ float2* slopes() { return reinterpret_cast<float2*>(this + 1); }
};

// dL/dscore = (a - w dL/dk) / T.
struct SoftSlope {
  float a, w, u;

  __device__ __forceinline__ SoftSlope(float value, float grad, bool log, bool with_u) {
    const float m = log ? expf(value) : value, rest = log ? -expm1f(value) : 1.0f - value;
    w = m * rest;
    u = 0;
    // Missing scores have no gradient, whatever the gradient of their mask is.
    a = log ? value >= -kLargest ? grad * rest : 0.0f : w > 0 ? grad * w : 0.0f;
    if (with_u && rest > 0 && value >= -kLargest && (log || value > 0)) u = (log ? value : logf(m)) - logf(rest);
  }
};

// `on_chip`: the slopes that a block has shared memory for.
template <ScoreType type, int kBlock>
__global__ void __launch_bounds__(kBlock, kSoftThreads / kBlock)
    soft_topk_grad_kernel(const LKV_GRID_CONSTANT SoftTopkGradParams p, const int on_chip) {
  auto* shared = dyn_smem<SoftGradShared<kBlock>>();
  if (threadIdx.x == 0) shared->totals.round = 0;
  const auto rows = static_cast<uint32_t>(p.rows.count());
  const bool log = p.rows.log, with_u = p.grad_temperature != nullptr;
  for (uint32_t row = blockIdx.x / SoftCluster::size(); row < rows; row += gridDim.x / SoftCluster::size()) {
    plan_row(shared, p.rows, nullptr, row);
    const SoftPlan& plan = shared->plan;
    const float weight = static_cast<const float*>(p.weights)[row];
    const int begin = plan.begin, end = weight > 0 ? plan.end : begin;
    const float* mask = static_cast<const float*>(p.mask) + int64_t{row} * p.rows.length;
    const float* grad = static_cast<const float*>(p.grad) + int64_t{row} * p.rows.length;
    float2* slopes = end - begin <= on_chip ? shared->slopes() : nullptr;
    float parts[3] = {};  // of a, a u and w u
#pragma unroll 4
    for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kBlock) {
      const SoftSlope x(mask[i], grad[i], log, with_u);
      if (slopes != nullptr) slopes[i - begin] = {x.a, x.w};
      parts[0] += x.a;
      parts[1] = fmaf(x.a, x.u, parts[1]);
      parts[2] = fmaf(x.w, x.u, parts[2]);
    }
    shared->totals.template exchange<0>(parts);
    if (threadIdx.x == 0) {
      double sums[3];
      shared->totals.template read<0>(sums);
      const double mean = weight > 0 ? sums[0] * reciprocal(static_cast<double>(weight)) : 0;
      shared->mean = static_cast<float>(mean);
      shared->inverse = static_cast<float>(plan.inverse);
      if (SoftCluster::rank() == 0) {
        static_cast<float*>(p.grad_k)[row] = shared->mean;
        if (with_u) {
          static_cast<float*>(p.grad_temperature)[row] = static_cast<float>((sums[2] * mean - sums[1]) * plan.inverse);
        }
      }
    }
    block_sync();
    if (p.grad_scores != nullptr) {
      const float mean = shared->mean, inverse = shared->inverse;
      auto* out = static_cast<typename ScoreTraits<type>::Bits*>(p.grad_scores) + int64_t{row} * p.rows.length;
#pragma unroll 4
      for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kBlock) {
        float2 slope;
        if (slopes != nullptr) {
          slope = slopes[i - begin];
        } else {
          const SoftSlope x(mask[i], grad[i], log, false);
          slope = {x.a, x.w};
        }
        out[i] = from_float<type>(fmaf(slope.y, -mean, slope.x) * inverse);
      }
      const int64_t first = int64_t{SoftCluster::rank()} * kBlock + threadIdx.x, behind = weight > 0 ? plan.n : 0;
      for (int64_t i = behind + first; i < p.rows.length; i += int64_t{SoftCluster::size()} * kBlock) out[i] = 0;
    }
    // The plan may go, and no peer reads this block's totals any more.
    SoftCluster::sync();
  }
}

}  // namespace lkv::cuda
