#include "host/ragged.h"
#include "ops.h"

namespace lkv::torch_ops {
namespace {

// The output of params, to which it is added with the options. Tokens before heads, as the layer behind an attention
// reads them.
Tensor prepare(AttendParams& params, const Tensor& q, bool causal, double scale, double softcap) {
  params.causal = causal;
  params.scale = static_cast<float>(scale);
  params.softcap = static_cast<float>(softcap);
  const int64_t query_heads = params.heads * params.group;
  Tensor out = empty({params.batch, params.queries, query_heads, params.dim_v}, view(q).dtype, q);
  const int64_t row = params.dim_v * view(q).itemsize;
  params.out = {data<char>(out), params.queries * query_heads * row, row, query_heads * row};
  return out;
}

}  // namespace

Tensor attend(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor lengths, int64_t longest, bool causal,
              double scale, double softcap, std::optional<Tensor> sinks) {
  const host::Ragged cache = {{view(k), view(v)}, view(cu_seqlens), view(lengths), {}};
  AttendParams params = host::check_attend(view(q), cache, view(sinks), longest);
  Tensor out = prepare(params, q, causal, scale, softcap);
  if (runs_cuda(view(q).device)) {
    const CudaScope scope(view(q).device);
    const Tensor scratch = empty_bytes(static_cast<int64_t>(cuda::attend_scratch(params)), q);
    scope.check(cuda::attend(params, scratch.data_ptr(), scope.stream()), "attend");
    return out;
  }
  cpu::attend(params, torch_threads());
  return out;
}

Tensor attend_paged(Tensor q, Tensor k, Tensor v, Tensor tables, Tensor lengths, int64_t longest, bool causal,
                    double scale, double softcap, std::optional<Tensor> sinks) {
  const host::Paged cache = {{view(k), view(v)}, view(tables), view(lengths)};
  auto [params, pages] = host::check_attend_paged(view(q), cache, view(sinks), longest);
  host::check_value(!runs_cuda(view(q).device), "expected q on cpu, as only the kernels of the CPU read pages, got ",
                    host::describe(view(q).device));
  Tensor out = prepare(params, q, causal, scale, softcap);
  cpu::attend_paged(params, pages, torch_threads());
  return out;
}

}  // namespace lkv::torch_ops
