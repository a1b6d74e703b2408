#include "toy.h"

// Reverses numbers through shared memory; broken: threads do not wait for the others to have written.

namespace {

using namespace lkv::cuda;

template <bool broken>
__global__ void reverse(int* out) {
  int* shared = dyn_smem<int>();
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (!broken) block_sync();
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

int run(bool broken) {
  constexpr unsigned n = 96;
  toy::Array<int> out(n);
  toy::launch({.blocks = 1, .threads = n, .shared_bytes = n * sizeof(int)}, broken ? reverse<true> : reverse<false>,
              out.data());
  emulator_synchronize();
  return out.wrong([](size_t i) { return static_cast<int>(n - 1 - i); });
}

toy::Register registered("block_barrier", run);

}  // namespace
