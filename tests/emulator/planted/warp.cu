#include "toy.h"

// Warp operations: a shuffle from a lane that is outside of the mask, a ballot that half of the lanes miss, and data
// passed through shared memory without __syncwarp.

namespace {

using namespace lkv::cuda;

template <bool broken>
__global__ void first_of_half(int* out) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  out[threadIdx.x] = __shfl_sync(mask, static_cast<int>(threadIdx.x), broken ? 0 : lane & 16);
}

template <bool broken>
__global__ void count_low(int* out) {
  const unsigned lane = threadIdx.x % 32;
  if (!broken || lane < 16) out[threadIdx.x] = __popc(__ballot_sync(0xffffffffu, lane < 16));
}

template <bool broken>
__global__ void flip(int* out) {
  int* shared = dyn_smem<int>();
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (!broken) __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 31];
}

template <class Expected>
int run(void (*kernel)(int*), Expected expected) {
  constexpr unsigned n = 64;
  toy::Array<int> out(n);
  toy::launch({.blocks = 1, .threads = n, .shared_bytes = n * sizeof(int)}, kernel, out.data());
  emulator_synchronize();
  return out.wrong([&](size_t i) { return expected(static_cast<int>(i)); });
}

toy::Register shuffle("stale_shuffle", [](bool broken) {
  return run(broken ? first_of_half<true> : first_of_half<false>, [](int i) { return i & ~15; });
});
toy::Register ballot("divergent_ballot", [](bool broken) {
  return run(broken ? count_low<true> : count_low<false>, [](int) { return 16; });
});
toy::Register warp_barrier("warp_barrier", [](bool broken) {
  return run(broken ? flip<true> : flip<false>, [](int i) { return i ^ 31; });
});

}  // namespace
