#include "ops.h"
#include "overlap.h"

namespace lkv::torch_ops {

Tensors new_outputs(const Problem& problem, int64_t total, int64_t padded) {
  Tensors outputs;
  for (const Payload& payload : problem.payloads) {
    outputs.push_back(empty(problem.output_shape(total, padded, payload.trailing), payload.dtype, problem.device));
    if (!runs_cuda(problem.device)) {
      const Tensor& out = outputs.back();
      cpu::advise_huge_pages(out.data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
    }
  }
  return outputs;
}

namespace {

std::vector<Named> named(const Tensors& tensors, const char* list) {
  std::vector<Named> names;
  for (size_t i = 0; i < tensors.size(); ++i) names.push_back({tensors[i], list + ("[" + std::to_string(i) + "]")});
  return names;
}

void select_and_gather(Problem& problem, const Sizes& sizes, const Tensors& out, const Index& index, bool warm) {
  Launch launch(problem, out, true);
  launch.select(sizes, index, true);
  launch.gather(index.positions, index.cu_seqlens, /*behind_select=*/true, warm);
}

}  // namespace

EvictTuple evict(Tensors payload, Tensors scores, LKV_SIZE_PARAMETERS) {
  const Sizes sizes = LKV_SIZES;
  Problem problem(payload, scores, LKV_LAYOUT(static_cast<int64_t>(scores.size())));
  problem.read_sizes(sizes);
  const Index index = new_index(problem, sizes, count_overflow);
  Tensors out = new_outputs(problem, sizes.total, sizes.padded);
  select_and_gather(problem, sizes, out, index, false);
  return {std::move(out), index.positions, index.lengths, index.cu_seqlens, index.overflow};
}

void evict_out(Tensors out, Tensor positions, Tensor kept, Tensor offsets, std::optional<Tensor> overflow,
               Tensors payload, Tensors scores, LKV_SIZE_PARAMETERS) {
  const Sizes sizes = LKV_SIZES;
  Problem problem(payload, scores, LKV_LAYOUT(static_cast<int64_t>(scores.size())));
  problem.read_sizes(sizes);

  std::vector<Named> written = named(out, "out");
  check_value(out.size() == problem.payloads.size(), "expected ", problem.payloads.size(), " tensors in out, got ",
              out.size());
  for (size_t p = 0; p < out.size(); ++p) {
    const Payload& like = problem.payloads[p];
    const Shape expected = problem.output_shape(sizes.total, sizes.padded, like.trailing);
    check_device(written[p], problem.device);
    check_type(dtype_of(out[p]) == like.dtype, "expected ", written[p].name, " of the dtype of what moves into it");
    check_value(shape_of(out[p]) == expected && out[p].is_contiguous(), "expected ", written[p].name,
                " contiguous of shape ", expected, ", got ", shape_of(out[p]));
  }
  const Index index{positions, kept, offsets, overflow ? *overflow : empty_int32({0}, problem.device)};
  const Named results[] = {{index.positions, "out.positions"},
                           {index.lengths, "out.lengths"},
                           {index.cu_seqlens, "out.cu_seqlens"},
                           {index.overflow, "out.overflow"}};
  check_int32(results[0], problem.output_shape(sizes.total, sizes.padded, {}), "[T']");
  check_int32(results[1], problem.lengths_shape(), "[B, H]");
  check_int32(results[2], {problem.rows() + 1}, "[B * H + 1]");
  check_int32(results[3], count_overflow ? Shape{} : Shape{0}, "[]");
  for (const Named& result : results) {
    check_device(result, problem.device);
    written.push_back(result);
  }
  std::vector<Named> read = named(payload, "payload");
  for (const Named& score : named(scores, "scores")) read.push_back(score);
  check_disjoint(written, read);
  select_and_gather(problem, sizes, out, index, true);
}

IndexTuple evict_(Tensors payload, Tensors scores, LKV_SIZE_PARAMETERS) {
  const Sizes sizes = LKV_SIZES;
  Problem problem(payload, scores, LKV_LAYOUT(static_cast<int64_t>(scores.size())));
  problem.read_sizes(sizes);
  check_disjoint(named(payload, "payload"), named(scores, "scores"));
  const Index index = new_index(problem, sizes, count_overflow);
  Launch launch(problem, {}, true);
  launch.select(sizes, index, false);
  launch.compact(index);
  return {index.positions, index.lengths, index.cu_seqlens, index.overflow};
}

}  // namespace lkv::torch_ops
