#include "toy.h"

// A sum over the blocks of a cluster, in kernels that were compiled for an architecture without clusters. Broken: the
// host launches clusters because the device has them; every block believes to be the only one.

namespace {

using namespace lkv::cuda;

constexpr unsigned threads = 32;

__global__ void count(int* out) {
  int* shared = dyn_smem<int>();
  if (threadIdx.x == 0) *shared = 1;
  cluster_sync();
  int blocks = 0;
  for (uint32_t rank = 0; rank < cluster_size(); ++rank) blocks += *map_shared_rank(shared, rank);
  if (threadIdx.x == 0) out[blockIdx.x] = blocks;
  cluster_sync();
}

int run(bool broken) {
  toy::Array<int> out(4);
  cudaFuncAttributes code = {};
  cudaFuncGetAttributes(&code, count);
  const unsigned cluster = broken || code.ptxVersion >= 90 ? 4 : 1;
  toy::launch({.blocks = 4, .threads = threads, .cluster = cluster, .shared_bytes = sizeof(int)}, count, out.data());
  emulator_synchronize();
  return out.wrong([&](size_t) { return static_cast<int>(cluster); });
}

toy::Register registered("old_cluster", run, /*code=*/80);

}  // namespace
