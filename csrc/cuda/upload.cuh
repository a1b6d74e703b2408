#pragma once

#include <cstring>

#include "launch.h"
#include "primitives.cuh"

namespace lkv::cuda {

// Bytes that travel as an argument of a launch; all arguments together have 4 KB.
inline constexpr uint32_t kChunkWords = 216;

struct Chunk {
  uint4 words[kChunkWords];
  char* out;
  uint32_t bytes;
};

// By the threads of one block, which may read them a barrier later.
__device__ __forceinline__ void write_chunk(const Chunk& chunk) {
  uint32_t copied = 0;
  if (reinterpret_cast<uintptr_t>(chunk.out) % sizeof(uint4) == 0) {
    copied = chunk.bytes / sizeof(uint4) * sizeof(uint4);
    for (uint32_t i = threadIdx.x; i < copied / sizeof(uint4); i += blockDim.x) {
      reinterpret_cast<uint4*>(chunk.out)[i] = chunk.words[i];
    }
  }
  const char* in = reinterpret_cast<const char*>(chunk.words);
  for (uint32_t i = copied + threadIdx.x; i < chunk.bytes; i += blockDim.x) chunk.out[i] = in[i];
}

// Takes the first chunk off what is left.
inline Chunk take_chunk(Upload& left) {
  Chunk chunk;
  chunk.out = static_cast<char*>(left.device);
  chunk.bytes = static_cast<uint32_t>(std::min(left.bytes, sizeof chunk.words));
  std::memcpy(chunk.words, left.host, chunk.bytes);
  left = {static_cast<const char*>(left.host) + chunk.bytes, chunk.out + chunk.bytes, left.bytes - chunk.bytes};
  return chunk;
}

Status upload_chunk(const Chunk& chunk, Stream stream);

}  // namespace lkv::cuda
