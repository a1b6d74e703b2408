#include <cstring>

#include "launch.h"
#include "primitives.cuh"

namespace lkv::cuda {
namespace {

constexpr int kBlock = 256;
constexpr int kWords = 240;  // with the other arguments below the 4 KB that every launch may carry

struct Chunk {
  uint4 words[kWords];
};

__global__ void __launch_bounds__(kBlock)
    upload_kernel(const LKV_GRID_CONSTANT Chunk chunk, char* out, uint32_t bytes) {
  uint32_t copied = 0;
  if (reinterpret_cast<uintptr_t>(out) % sizeof(uint4) == 0) {
    copied = bytes / sizeof(uint4) * sizeof(uint4);
    if (threadIdx.x < bytes / sizeof(uint4)) reinterpret_cast<uint4*>(out)[threadIdx.x] = chunk.words[threadIdx.x];
  }
  const char* in = reinterpret_cast<const char*>(chunk.words);
  for (uint32_t i = copied + threadIdx.x; i < bytes; i += kBlock) out[i] = in[i];
}
static_assert(kWords <= kBlock);

}  // namespace

Status upload(const void* host, void* device, size_t bytes, Stream stream) {
  Chunk chunk;
  for (size_t done = 0; done < bytes; done += sizeof chunk) {
    const uint32_t size = static_cast<uint32_t>(std::min(bytes - done, sizeof chunk));
    std::memcpy(&chunk, static_cast<const char*>(host) + done, size);
    const Status status =
        launch(upload_kernel, {.blocks = 1, .block = kBlock}, stream, chunk, static_cast<char*>(device) + done, size);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

const char* describe(Status status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

}  // namespace lkv::cuda
