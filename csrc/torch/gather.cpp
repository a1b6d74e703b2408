#include "ops.h"

namespace lkv::torch_ops {

// positions: [T'] packed, or [B, H, C] (with layers [N, B, H, C]) padded.
Tensors gather(Tensors tensors, int64_t layers, int64_t batch, int64_t heads, std::optional<Tensor> source_cu_seqlens,
               Tensor positions, Tensor cu_seqlens) {
  host::Problem problem(view(tensors), {}, {layers, batch, heads, view(source_cu_seqlens)});
  const int64_t padded = problem.check_index(view(positions), view(cu_seqlens));
  Tensors out = new_outputs(problem, tensors, positions.numel(), padded);
  Launch(problem, out, tensors[0], false).gather(positions, cu_seqlens, /*behind_select=*/false, /*warm=*/false);
  return out;
}

}  // namespace lkv::torch_ops
