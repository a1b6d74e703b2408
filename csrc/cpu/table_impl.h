#pragma once

#include "attend_kernels_impl.h"
#include "copy_kernels_impl.h"
#include "key_kernels_impl.h"
#include "soft_topk_kernels_impl.h"

namespace lkv::cpu {
namespace {

template <class S>
constexpr RowKernels make_row_kernels(const char* name) {
  return {
      name,
      {score_kernels<S, ScoreType::f32>(), score_kernels<S, ScoreType::f16>(), score_kernels<S, ScoreType::bf16>()},
      key_kernels<S>(),
      pick_copy<S>,
      pick_stream<S>,
      S::fence,
      Attend<S>::run,
      {soft_kernels<S, ScoreType::f32>(), soft_kernels<S, ScoreType::f16>(), soft_kernels<S, ScoreType::bf16>()},
  };
}

}  // namespace
}  // namespace lkv::cpu
