#pragma once

#include <bit>
#include <cstdint>

#include "lkv/keys.h"

// Scores' types as float32 and back, by their bits; to 16 bits rounds to nearest, ties to even. Host code.

namespace lkv {

template <ScoreType type>
float to_float(typename ScoreTraits<type>::Bits bits) {
  if constexpr (type == ScoreType::f32) {
    return std::bit_cast<float>(bits);
  } else if constexpr (type == ScoreType::bf16) {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  } else {
    const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    if (magnitude >= ScoreTraits<type>::infinity) return std::bit_cast<float>(sign | 0x7f800000u | magnitude << 13);
    // The exponent's bias grows from 15 to 127; the product also normalises subnormal numbers.
    const float value = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
  }
}

template <ScoreType type>
typename ScoreTraits<type>::Bits from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffffu;
  if constexpr (type == ScoreType::f32) {
    return bits;
  } else if constexpr (type == ScoreType::bf16) {
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);  // NaN stays one
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
  } else {
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    if (magnitude > 0x7f800000u) return sign | 0x7e00u;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 65536 or more
    if (magnitude < 0x38800000u) {                        // subnormal: 0.5 is where one unit is 2^-24
      const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
      return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | (magnitude + 0xfffu + (magnitude >> 13 & 1) - (112u << 23)) >> 13);
  }
}

}  // namespace lkv
