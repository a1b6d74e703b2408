#pragma once

#include "lkv/params.h"

namespace lkv::cuda {

// A segment of a ragged cache [T, ...], wherever cu_seqlens and lengths point.
struct Span {
  int64_t begin, size;  // rows [begin, begin + size) of T
  int64_t length;       // of which are in use
};

__device__ __forceinline__ Span span_of(const int32_t* cu_seqlens, const int32_t* lengths, int64_t tokens,
                                        int64_t row) {
  const int64_t begin = clamp(cu_seqlens[row], 0, tokens);
  const int64_t size = clamp(cu_seqlens[row + 1], begin, tokens) - begin;
  return {begin, size, clamp(lengths[row], 0, size)};
}

}  // namespace lkv::cuda
