#include "toy.h"

// A copy through shared memory; broken: one element past the end of the shared or of the global array.

namespace {

using namespace lkv::cuda;

template <int past_shared, int past_global>
__global__ void copy(int* out, int n) {
  int* shared = dyn_smem<int>();
  const int i = static_cast<int>(threadIdx.x);
  if (i < n + past_shared) shared[i] = i;
  block_sync();
  if (i < n + past_global) out[i] = i < n ? shared[i] : 0;
}

int run(void (*kernel)(int*, int)) {
  constexpr int n = 37;
  toy::Array<int> out(n);
  toy::launch({.blocks = 1, .threads = 64, .shared_bytes = n * sizeof(int)}, kernel, out.data(), n);
  emulator_synchronize();
  return out.wrong([](size_t i) { return static_cast<int>(i); });
}

toy::Register shared("shared_bounds", [](bool broken) { return run(broken ? copy<1, 0> : copy<0, 0>); });
toy::Register global("global_bounds", [](bool broken) { return run(broken ? copy<0, 1> : copy<0, 0>); });

}  // namespace
