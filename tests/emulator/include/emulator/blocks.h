#pragma once

// Included by tuning.h. Every kernel is also compiled for small blocks, so that a case has few threads.

namespace lkv::cuda {

inline constexpr int kTestBlock = 64;

// f of the threads per block, known at compile time.
template <int kBlock, class F>
auto with_block(const Tuning& tuning, F&& f) {
  return tuning.block == kTestBlock ? f.template operator()<kTestBlock>() : f.template operator()<kBlock>();
}

}  // namespace lkv::cuda
