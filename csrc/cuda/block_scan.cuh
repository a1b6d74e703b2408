#pragma once

#include "primitives.cuh"

namespace lkv::cuda {

inline constexpr uint32_t kFullWarp = 0xffffffffu;
inline constexpr int kWarp = 32;
inline constexpr int kResidentThreads = 1024;  // registers are bounded so that this many share a multiprocessor

__device__ __forceinline__ int lane_id() {
  return threadIdx.x % kWarp;
}
__device__ __forceinline__ int warp_id() {
  return threadIdx.x / kWarp;
}

template <class T>
__device__ __forceinline__ T warp_inclusive_sum(T x) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const T below = __shfl_up_sync(kFullWarp, x, step);
    if (lane_id() >= step) x += below;
  }
  return x;
}

// Sums over the threads of a block, in thread order. Lives in shared memory; called by all threads.
template <class T, int kBlock>
struct BlockScan {
  static_assert(kBlock % kWarp == 0 && kBlock <= kWarp * kWarp);
  T warps[kBlock / kWarp];

  // The sum over lower threads, and over all of them.
  __device__ __forceinline__ T exclusive(T x, T& total) {
    const T inclusive = warp_inclusive_sum(x);
    if (lane_id() == kWarp - 1) warps[warp_id()] = inclusive;
    block_sync();
    const T mine = lane_id() < kBlock / kWarp ? warps[lane_id()] : T{0};
    const T upto = warp_inclusive_sum(mine);
    total = __shfl_sync(kFullWarp, upto, kWarp - 1);
    const T before = __shfl_sync(kFullWarp, upto - mine, warp_id());
    block_sync();  // the next scan overwrites `warps`
    return before + inclusive - x;
  }
};

}  // namespace lkv::cuda
