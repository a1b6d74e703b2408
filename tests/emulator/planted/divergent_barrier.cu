#include "toy.h"

// Broken: threads with nothing to do return before a barrier of their block, or wait at another one.

namespace {

using namespace lkv::cuda;

enum class Way { together, early_return, other_place };

template <Way way>
__global__ void shift(int* out, int n) {
  int* shared = dyn_smem<int>();
  const int i = static_cast<int>(threadIdx.x);
  if (way == Way::early_return && i >= n) return;
  shared[i] = i;
  if (way == Way::other_place && i >= n) {
    block_sync();
  } else {
    block_sync();
  }
  if (i < n) out[i] = shared[(i + 1) % n];
}

int run(void (*kernel)(int*, int)) {
  constexpr int n = 40;
  toy::Array<int> out(n);
  toy::launch({.blocks = 2, .threads = 64, .shared_bytes = 64 * sizeof(int)}, kernel, out.data(), n);
  emulator_synchronize();
  return out.wrong([](size_t i) { return static_cast<int>((i + 1) % n); });
}

toy::Register early("divergent_barrier",
                    [](bool broken) { return run(broken ? shift<Way::early_return> : shift<Way::together>); });
toy::Register other("barrier_elsewhere",
                    [](bool broken) { return run(broken ? shift<Way::other_place> : shift<Way::together>); });

}  // namespace
