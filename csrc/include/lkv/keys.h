#pragma once

#include <cstdint>

// LKV_HD marks what host code, CUDA kernels and the emulator share.
#if defined(__CUDACC__)
#define LKV_HD __host__ __device__ __forceinline__
#else
#define LKV_HD inline
#endif

// Order-preserving keys: unsigned integers that compare as the scores do, with NaN below -inf and -0 equal to +0.
// Every score type becomes 32 bits with its significant bits at the top, so that one radix serves them all.

namespace lkv {

enum class ScoreType : int32_t { f32, f16, bf16 };

template <ScoreType>
struct ScoreTraits;

template <>
struct ScoreTraits<ScoreType::f32> {
  using Bits = uint32_t;
  static constexpr Bits infinity = 0x7f800000u;
};

template <>
struct ScoreTraits<ScoreType::f16> {
  using Bits = uint16_t;
  static constexpr Bits infinity = 0x7c00u;
};

template <>
struct ScoreTraits<ScoreType::bf16> {
  using Bits = uint16_t;
  static constexpr Bits infinity = 0x7f80u;
};

template <ScoreType type>
LKV_HD uint32_t ordered_key(typename ScoreTraits<type>::Bits bits) {
  constexpr int width = 8 * sizeof(bits);
  constexpr uint32_t sign = uint32_t{1} << (width - 1);
  constexpr uint32_t all = sign | (sign - 1);
  const uint32_t value = bits;
  const uint32_t magnitude = value & ~sign;
  if (magnitude > ScoreTraits<type>::infinity) return 0;  // NaN
  const bool negative = (value & sign) != 0 && magnitude != 0;
  const uint32_t key = negative ? ~value & all : magnitude | sign;
  return key << (32 - width);
}

}  // namespace lkv
