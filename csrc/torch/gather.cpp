#include "ops.h"

namespace lkv::torch_ops {

// positions: [T'] packed, or [B, H, C] (with layers [N, B, H, C]) padded.
Tensors gather(Tensors tensors, Tensor positions, Tensor cu_seqlens, int64_t layers,
               std::optional<Tensor> source_cu_seqlens, int64_t batch, int64_t heads) {
  host::Problem problem(view(tensors), {}, {layers, batch, heads, view(source_cu_seqlens)});
  const int64_t padded = problem.check_index(view(positions), view(cu_seqlens));
  Tensors out;
  add_outputs(out, problem, tensors, positions.numel(), padded);
  Launch(problem, out.data(), tensors[0], false)
      .gather(data<int32_t>(positions), data<int32_t>(cu_seqlens), positions.numel());
  return out;
}

}  // namespace lkv::torch_ops
