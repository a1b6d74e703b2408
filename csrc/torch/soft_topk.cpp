#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "host/soft_topk.h"
#include "ops.h"

namespace lkv::torch_ops {

namespace {

// The dtype of the mask, and of all that is kept per row.
int32_t mask_dtype(bool wide) {
  return wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

Shape leading_shape(const Tensor& t) {
  return Shape(t.sizes().begin(), t.sizes().end() - 1);
}

void check_cuda(const SoftRows& rows) {
  host::check_type(!rows.wide, "expected float32, float16 or bfloat16 on CUDA, got float64");
}

int32_t score_dtype(const SoftRows& rows) {
  if (rows.wide) return aoti_torch_dtype_float64();
  switch (rows.type) {
    case ScoreType::f32:
      return aoti_torch_dtype_float32();
    case ScoreType::f16:
      return aoti_torch_dtype_float16();
    default:
      return aoti_torch_dtype_bfloat16();
  }
}

}  // namespace

std::tuple<Tensor, Tensor> soft_topk(Tensor scores, std::optional<Tensor> k, double k_value,
                                     std::optional<Tensor> temperature, double temperature_value,
                                     std::optional<Tensor> lengths, bool log) {
  const host::Array array = view(scores);
  SoftTopkParams p =
      host::check_soft_topk(array, {view(k), k_value}, {view(temperature), temperature_value}, view(lengths), log);
  const Tensor mask = empty(array.shape(), mask_dtype(p.rows.wide), scores);
  const Tensor weights = empty(leading_shape(scores), mask_dtype(p.rows.wide), scores);
  p.mask = mask.data_ptr();
  p.weights = weights.data_ptr();
  if (runs_cuda(array.device)) {
    check_cuda(p.rows);
    const CudaScope scope(array.device);
    scope.check(cuda::soft_topk(p, scope.stream()), "soft_topk");
    return {mask, weights};
  }
  cpu::soft_topk(p, torch_threads());
  return {mask, weights};
}

// `element`: the dtype of the scores as ScoreType counts; 3: float64.
std::tuple<Tensor, Tensor, Tensor> soft_topk_backward(Tensor grad, Tensor mask, Tensor weights,
                                                      std::optional<Tensor> temperature, double temperature_value,
                                                      std::optional<Tensor> lengths, int64_t element, bool log,
                                                      bool to_scores, bool to_temperature) {
  const host::Array array = view(mask);
  host::check_value(element >= 0 && element <= 3, "expected element in [0, 3], got ", element);
  SoftTopkGradParams p{};
  p.rows = host::soft_rows({array, "mask"}, {}, {view(temperature), temperature_value}, view(lengths));
  p.rows.wide = element == 3;
  p.rows.type = static_cast<ScoreType>(p.rows.wide ? 0 : element);
  p.rows.log = log;
  for (const host::Named& like : {host::Named{view(grad), "grad"}, host::Named{array, "mask"}}) {
    host::check_value(like.array.shape() == array.shape() && like.array.is_contiguous() &&
                          like.array.dtype == mask_dtype(p.rows.wide) && like.array.device == array.device,
                      "expected ", like.name, " contiguous and like the mask");
  }
  const host::Array of_rows = view(weights);
  host::check_value(of_rows.shape() == leading_shape(mask) && of_rows.dtype == array.dtype && of_rows.is_contiguous() &&
                        of_rows.device == array.device,
                    "expected weights of the rows of the mask, contiguous, got ", of_rows.shape());
  const Tensor grad_scores = empty(to_scores ? array.shape() : Shape{0}, score_dtype(p.rows), mask);
  const Tensor grad_k = empty(leading_shape(mask), mask_dtype(p.rows.wide), mask);
  const Tensor grad_temperature = empty(to_temperature ? leading_shape(mask) : Shape{0}, mask_dtype(p.rows.wide), mask);
  p.grad = grad.data_ptr();
  p.mask = mask.data_ptr();
  p.weights = weights.data_ptr();
  p.grad_scores = to_scores ? grad_scores.data_ptr() : nullptr;
  p.grad_k = grad_k.data_ptr();
  p.grad_temperature = to_temperature ? grad_temperature.data_ptr() : nullptr;
  if (runs_cuda(array.device)) {
    check_cuda(p.rows);
    const CudaScope scope(array.device);
    scope.check(cuda::soft_topk_grad(p, scope.stream()), "soft_topk_backward");
    return {grad_scores, grad_k, grad_temperature};
  }
  cpu::soft_topk_grad(p, torch_threads());
  return {grad_scores, grad_k, grad_temperature};
}

}  // namespace lkv::torch_ops
