#pragma once

#include "primitives.cuh"

// What gather and compact share: vectors as wide as the alignment of their addresses allows, and lanes for a row.

namespace lkv::cuda {

inline constexpr int kInFlight = 4;  // independent loads of a thread before its first store

// Calls f with a vector type that fits addresses and sizes whose bits were or-ed into `bits`.
template <class F>
__device__ __forceinline__ void with_vector(uint32_t bits, F&& f) {
  if (bits % 16 == 0) {
    f(uint4{});
  } else if (bits % 8 == 0) {
    f(uint2{});
  } else if (bits % 4 == 0) {
    f(uint32_t{});
  } else if (bits % 2 == 0) {
    f(uint16_t{});
  } else {
    f(uint8_t{});
  }
}

__device__ __forceinline__ uint32_t low_bits(const void* p) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p));
}

// The lanes that share a row of `vectors` vectors: a power of two, so that no thread divides.
__device__ __forceinline__ uint32_t lanes_per_row(int64_t vectors, uint32_t most) {
  uint32_t lanes = 1;
  while (lanes < most && lanes < vectors) lanes *= 2;
  return lanes;
}

}  // namespace lkv::cuda
