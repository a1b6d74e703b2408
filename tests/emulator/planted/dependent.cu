#include "toy.h"

// A producer, a consumer launched behind it with programmatic dependent launch, and a third kernel that writes over
// the consumer's input. Broken: the consumer does not wait for its flag; the consumer never waits for the producer's
// grid, so that the third kernel may overtake what the producer still writes; a flag that is never set.

namespace {

using namespace lkv::cuda;

enum class Drop { none, flag_wait, dependency_wait, flag };

constexpr unsigned blocks = 3, threads = 32, n = blocks * threads;

template <Drop drop>
__global__ void produce(int* data, int* late, uint32_t* flags) {
  trigger_dependents();
  const unsigned i = blockIdx.x * threads + threadIdx.x;
  data[i] = static_cast<int>(i) + 1;
  block_sync();
  if (threadIdx.x == 0 && drop != Drop::flag) store_release(flags + blockIdx.x, 1);
  block_sync();
  late[i] = 1;
}

template <Drop drop>
__global__ void consume(const int* data, const uint32_t* flags, int* out) {
  if (drop != Drop::flag_wait) {
    while (load_acquire(flags + blockIdx.x) == 0) spin_pause();
  }
  const unsigned i = blockIdx.x * threads + threadIdx.x;
  out[i] = data[i];
  if (drop != Drop::dependency_wait) grid_dependency_wait();
}

__global__ void overwrite(int* late) {
  late[blockIdx.x * threads + threadIdx.x] = 2;
}

template <Drop drop>
int run() {
  toy::Array<int> data(n), late(n), out(n);
  toy::Array<uint32_t> flags(blocks);
  toy::launch({.blocks = blocks, .threads = threads}, produce<drop>, data.data(), late.data(), flags.data());
  toy::launch({.blocks = blocks, .threads = threads, .dependent = true}, consume<drop>, data.data(), flags.data(),
              out.data());
  toy::launch({.blocks = blocks, .threads = threads}, overwrite, late.data());
  emulator_synchronize();
  return out.wrong([](size_t i) { return static_cast<int>(i) + 1; }) + late.wrong([](size_t) { return 2; });
}

template <Drop drop>
int choose(bool broken) {
  return broken ? run<drop>() : run<Drop::none>();
}

toy::Register flag_wait("flag_wait", choose<Drop::flag_wait>);
toy::Register dependency_wait("dependency_wait", choose<Drop::dependency_wait>);
toy::Register livelock("livelock", choose<Drop::flag>);

}  // namespace
