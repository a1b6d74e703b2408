#include "ops.h"

namespace lkv::torch_ops {

// positions: [T'] packed, or [B, H, C] (with layers [N, B, H, C]) padded.
Tensors gather(Tensors tensors, int64_t layers, int64_t batch, int64_t heads, std::optional<Tensor> source_cu_seqlens,
               Tensor positions, Tensor cu_seqlens) {
  Problem problem(tensors, {}, {layers, batch, heads, source_cu_seqlens});
  const Named index[] = {{positions, "index.positions"}, {cu_seqlens, "index.cu_seqlens"}};
  for (const Named& t : index) check_device(t, problem.device);
  const Shape shape = shape_of(positions);
  const int64_t padded = shape.size() <= 1 ? -1 : shape.back();
  check_int32(index[0], problem.output_shape(positions.numel(), padded, {}), padded < 0 ? "[T']" : "[B, H, C]");
  check_int32(index[1], {problem.rows() + 1}, "[B * H + 1]");

  Tensors out = new_outputs(problem, positions.numel(), padded);
  Launch(problem, out, false).gather(positions, cu_seqlens, /*behind_select=*/false, /*warm=*/false);
  return out;
}

}  // namespace lkv::torch_ops
