#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY(lkv_ext, m) {
  m.def("select(Tensor[] scores" LKV_SCHEMA ") -> Tensor[]");
  m.def("evict(Tensor[] payload, Tensor[] scores" LKV_SCHEMA ") -> Tensor[]");
  // `evict` of what most calls give: every default costs its share of a tenth of a microsecond to box, every list more.
  m.def(
      "evict_plain(Tensor k, Tensor v, Tensor scores, SymInt[] budgets, SymInt total) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("evict_out(Tensor(a!)[] out, Tensor[] payload, Tensor[] scores" LKV_SCHEMA ") -> ()");
  // Four tensors, not a list: torch.compile functionalizes no op that writes and returns a list.
  m.def("evict_(Tensor(a!)[] payload, Tensor[] scores" LKV_SCHEMA ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("evict_paged_(Tensor(a!)[] pools, Tensor[] scores, Tensor[] tables" LKV_SCHEMA
        ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gather(Tensor[] tensors, Tensor positions, Tensor cu_seqlens, int layers=1, "
      "Tensor? source_cu_seqlens=None, SymInt batch=0, SymInt heads=0) -> Tensor[]");
  m.def(
      "append_(Tensor(a!)[] cache, Tensor(b!) positions, Tensor(c!) lengths, Tensor cu_seqlens, Tensor[] rows, "
      "SymInt position, SymInt[]? valid=None, Tensor? valid_tensor=None) -> ()");
  m.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor lengths, SymInt longest, bool causal, "
      "float scale, float softcap=0., Tensor? sinks=None) -> Tensor");
  m.def(
      "attend_paged(Tensor q, Tensor k, Tensor v, Tensor tables, Tensor lengths, SymInt longest, bool causal, "
      "float scale, float softcap=0., Tensor? sinks=None) -> Tensor");
  m.def(
      "soft_topk(Tensor scores, Tensor? k, float k_value, Tensor? temperature, float temperature_value, "
      "Tensor? lengths, bool log) -> (Tensor, Tensor)");
  m.def(
      "soft_topk_backward(Tensor grad, Tensor mask, Tensor weights, Tensor? temperature, float temperature_value, "
      "Tensor? lengths, int element, bool log, bool to_scores, bool to_temperature) -> (Tensor, Tensor, Tensor)");
}

namespace {

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("select", TORCH_BOX(&lkv::torch_ops::select));
  m.impl("evict", TORCH_BOX(&lkv::torch_ops::evict));
  m.impl("evict_plain", TORCH_BOX(&lkv::torch_ops::evict_plain));
  m.impl("evict_out", TORCH_BOX(&lkv::torch_ops::evict_out));
  m.impl("evict_", TORCH_BOX(&lkv::torch_ops::evict_));
  m.impl("evict_paged_", TORCH_BOX(&lkv::torch_ops::evict_paged_));
  m.impl("gather", TORCH_BOX(&lkv::torch_ops::gather));
  m.impl("append_", TORCH_BOX(&lkv::torch_ops::append_));
  m.impl("attend", TORCH_BOX(&lkv::torch_ops::attend));
  m.impl("attend_paged", TORCH_BOX(&lkv::torch_ops::attend_paged));
  m.impl("soft_topk", TORCH_BOX(&lkv::torch_ops::soft_topk));
  m.impl("soft_topk_backward", TORCH_BOX(&lkv::torch_ops::soft_topk_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lkv_ext, CPU, m) {
  register_ops(m);
}

#ifdef LKV_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(lkv_ext, CUDA, m) {
  register_ops(m);
}
#endif
