#include "toy.h"

// What only shows where plain loads may be stale. A consumer that is launched behind a producer by programmatic
// dependent launch waits for a flag; each time one thing is broken:
// - it reads an offset, which the grid in front of the producer has written, before it has waited or acquired anything;
// - one lane polls the flag, and the others go on without a barrier;
// - the host believes that a device which can delay a kernel runs code that does, but it was compiled for an older one.

namespace {

using namespace lkv::cuda;

enum class Way { right, plain_offset, no_warp_barrier };

constexpr unsigned threads = 32;

__global__ void place(int* offset, uint32_t* flag) {
  trigger_dependents();
  if (threadIdx.x == 0) {
    *offset = 1;
    *flag = 0;
  }
}

__global__ void produce(const int* offset, int* data, uint32_t* flag) {
  grid_dependency_wait();
  trigger_dependents();
  data[*offset + threadIdx.x] = static_cast<int>(threadIdx.x) + 1;
  block_sync();
  if (threadIdx.x == 0) store_release(flag, 1);
}

template <Way way>
__global__ void consume(const int* offset, const int* data, uint32_t* flag, int* out) {
  const int first = way == Way::plain_offset ? *offset : load_relaxed(offset);
  if (threadIdx.x == 0) {
    while (load_acquire(flag) == 0) spin_pause();
  }
  if (way == Way::no_warp_barrier) {
    __shfl_sync(0xffffffffu, 0, 0);
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = data[first + threadIdx.x];
  grid_dependency_wait();
}

int run(void (*consumer)(const int*, const int*, uint32_t*, int*)) {
  toy::Array<int> offset(1), data(threads + 1), out(threads);
  toy::Array<uint32_t> flag(1, 1);  // as the call before has left it
  toy::launch({.blocks = 1, .threads = threads}, place, offset.data(), flag.data());
  toy::launch({.blocks = 1, .threads = threads, .dependent = true}, produce, offset.data(), data.data(), flag.data());
  toy::launch({.blocks = 1, .threads = threads, .dependent = true}, consumer, offset.data(), data.data(), flag.data(),
              out.data());
  emulator_synchronize();
  return out.wrong([](size_t i) { return static_cast<int>(i) + 1; });
}

toy::Register offset("weak_offset",
                     [](bool broken) { return run(broken ? consume<Way::plain_offset> : consume<Way::right>); });
toy::Register lanes("weak_lanes",
                    [](bool broken) { return run(broken ? consume<Way::no_warp_barrier> : consume<Way::right>); });

__global__ void use(const int* offset, int* out) {
  grid_dependency_wait();
  out[threadIdx.x] = *offset + static_cast<int>(threadIdx.x);
}

int run_old_code(bool broken) {
  toy::Array<int> offset(1), out(threads);
  toy::Array<uint32_t> flag(1);
  int device = 0, major = 0;
  cudaFuncAttributes code = {};
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaFuncGetAttributes(&code, use);
  toy::launch({.blocks = 1, .threads = threads}, place, offset.data(), flag.data());
  toy::launch({.blocks = 1, .threads = threads, .dependent = broken ? major >= 9 : code.ptxVersion >= 90}, use,
              offset.data(), out.data());
  emulator_synchronize();
  return out.wrong([](size_t i) { return static_cast<int>(i) + 1; });
}

toy::Register old_code("old_code", run_old_code, /*code=*/80);

}  // namespace
