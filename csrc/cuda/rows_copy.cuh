#pragma once

#include "block_scan.cuh"

// What gather, compact and append share: vectors as wide as the alignment of their addresses allows, and lanes for a
// row.

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

// The row at target(i) becomes the row that lies at source(i), zeros where that is nullptr. By kThreads threads.
template <class Vector, int kThreads, class Source, class Target, class Count>
__device__ __forceinline__ void copy_rows(Source&& source, Target&& target, int64_t row_bytes, Count rows,
                                          uint32_t thread) {
  const int64_t vectors = row_bytes / static_cast<int64_t>(sizeof(Vector));
  const uint32_t lanes = lanes_per_row(vectors, kWarp);
  const Count step = static_cast<Count>(kThreads / lanes);
  for (Count row = thread / lanes; row < rows; row += step * kInFlight) {
    for (int64_t column = thread % lanes; column < vectors; column += lanes) {
      Vector moved[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const char* from = row + k * step < rows ? source(row + k * step) : nullptr;
        moved[k] = from == nullptr ? Vector{} : load_once(reinterpret_cast<const Vector*>(from) + column);
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const Count to = row + k * step;
        if (to < rows) reinterpret_cast<Vector*>(target(to))[column] = moved[k];
      }
    }
  }
}

}  // namespace lkv::cuda
