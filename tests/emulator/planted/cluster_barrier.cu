#include "toy.h"

// Every block reads a number of the next block of its cluster. Broken variants: no barrier before the read; none after
// it, so that a block may exit while others still read from it.

namespace {

using namespace lkv::cuda;

enum class Drop { none, before, after };

template <Drop drop>
__global__ void neighbours(int* out) {
  int* shared = dyn_smem<int>();
  const uint32_t rank = cluster_rank(), size = cluster_size();
  shared[threadIdx.x] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (drop != Drop::before) cluster_sync();
  const int* next = map_shared_rank(shared, (rank + 1) % size);
  out[blockIdx.x * blockDim.x + threadIdx.x] = next[threadIdx.x];
  if (drop != Drop::after) cluster_sync();
}

int run(void (*kernel)(int*)) {
  constexpr unsigned threads = 32, cluster = 4, blocks = 8;
  toy::Array<int> out(threads * blocks);
  toy::launch({.blocks = blocks, .threads = threads, .cluster = cluster, .shared_bytes = threads * sizeof(int)}, kernel,
              out.data());
  emulator_synchronize();
  return out.wrong([](size_t i) {
    const unsigned block = i / threads, next = block / cluster * cluster + (block + 1) % cluster;
    return static_cast<int>(next * threads + i % threads);
  });
}

toy::Register before("cluster_barrier",
                     [](bool broken) { return run(broken ? neighbours<Drop::before> : neighbours<Drop::none>); });
toy::Register after("cluster_exit",
                    [](bool broken) { return run(broken ? neighbours<Drop::after> : neighbours<Drop::none>); });

}  // namespace
