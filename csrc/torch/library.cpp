#include <torch/csrc/stable/library.h>

#include "ops.h"

#define LKV_INDEX_RETURNS "(Tensor positions, Tensor kept, Tensor offsets, Tensor overflow)"

STABLE_TORCH_LIBRARY(lkv_ext, m) {
  m.def("select(Tensor[] scores, " LKV_SIZE_SCHEMA ") -> " LKV_INDEX_RETURNS);
  m.def("evict(Tensor[] payload, Tensor[] scores, " LKV_SIZE_SCHEMA
        ") -> (Tensor[] out, Tensor positions, Tensor kept, Tensor offsets, Tensor overflow)");
  m.def(
      "evict_out(Tensor(a!)[] out, Tensor(b!) positions, Tensor(c!) kept, Tensor(d!) offsets, Tensor(e!)? overflow, "
      "Tensor[] payload, Tensor[] scores, " LKV_SIZE_SCHEMA ") -> ()");
  m.def("evict_(Tensor(a!)[] payload, Tensor[] scores, " LKV_SIZE_SCHEMA ") -> " LKV_INDEX_RETURNS);
  m.def(
      "gather(Tensor[] tensors, SymInt layers, SymInt batch, SymInt heads, Tensor? source_cu_seqlens, "
      "Tensor positions, Tensor cu_seqlens) -> Tensor[]");
}

namespace {

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("select", TORCH_BOX(&lkv::torch_ops::select));
  m.impl("evict", TORCH_BOX(&lkv::torch_ops::evict));
  m.impl("evict_out", TORCH_BOX(&lkv::torch_ops::evict_out));
  m.impl("evict_", TORCH_BOX(&lkv::torch_ops::evict_));
  m.impl("gather", TORCH_BOX(&lkv::torch_ops::gather));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lkv_ext, CPU, m) { register_ops(m); }

#ifdef LKV_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(lkv_ext, CUDA, m) { register_ops(m); }
#endif
