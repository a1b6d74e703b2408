#include "host/outputs.h"
#include "ops.h"

namespace lkv::torch_ops {

Tensors new_outputs(const host::Problem& problem, const Tensors& payload, int64_t total, int64_t padded) {
  Tensors outputs;
  for (size_t p = 0; p < problem.payloads.size(); ++p) {
    const host::Payload& like = problem.payloads[p];
    outputs.push_back(empty(problem.output_shape(total, padded, like.trailing), static_cast<int32_t>(like.dtype),
                            payload[p * problem.layers]));
    if (problem.device.kind == host::Device::cpu) {
      const Tensor& out = outputs.back();
      cpu::advise_huge_pages(out.data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
    }
  }
  return outputs;
}

namespace {

void select_and_gather(host::Problem& problem, const host::Sizes& sizes, const Tensors& out, const Index& index,
                       bool warm) {
  Launch launch(problem, out, index.lengths, true);
  launch.select(sizes, index, true);
  launch.gather(index.positions, index.cu_seqlens, /*behind_select=*/true, warm);
}

}  // namespace

EvictTuple evict(Tensors payload, Tensors scores, LKV_SIZE_PARAMETERS) {
  const host::Sizes sizes = LKV_SIZES;
  host::Problem problem(view(payload), view(scores), LKV_LAYOUT(static_cast<int64_t>(scores.size())));
  problem.read_sizes(sizes);
  const Index index = new_index(problem, sizes, scores[0], count_overflow);
  Tensors out = new_outputs(problem, payload, sizes.total, sizes.padded);
  select_and_gather(problem, sizes, out, index, false);
  return {std::move(out), index.positions, index.lengths, index.cu_seqlens, index.overflow};
}

void evict_out(Tensors out, Tensor positions, Tensor kept, Tensor offsets, std::optional<Tensor> overflow,
               Tensors payload, Tensors scores, LKV_SIZE_PARAMETERS) {
  const host::Sizes sizes = LKV_SIZES;
  const host::Arrays sources = view(payload), ranking = view(scores);
  host::Problem problem(sources, ranking, LKV_LAYOUT(static_cast<int64_t>(scores.size())));
  problem.read_sizes(sizes);
  host::check_value(overflow.has_value() == count_overflow, "expected out.overflow ",
                    count_overflow ? "where rows may be cut, got None" : "None where no rows are cut, got a tensor");
  host::check_outputs(problem, sizes, {view(out), view(positions), view(kept), view(offsets), view(overflow)}, sources,
                      ranking);
  const Index index{positions, kept, offsets, overflow ? *overflow : empty_int32({0}, positions)};
  select_and_gather(problem, sizes, out, index, true);
}

IndexTuple evict_(Tensors payload, Tensors scores, LKV_SIZE_PARAMETERS) {
  const host::Sizes sizes = LKV_SIZES;
  const host::Arrays moved = view(payload), ranking = view(scores);
  host::Problem problem(moved, ranking, LKV_LAYOUT(static_cast<int64_t>(scores.size())));
  problem.read_sizes(sizes);
  host::check_in_place(moved, ranking);
  const Index index = new_index(problem, sizes, scores[0], count_overflow);
  Launch launch(problem, {}, scores[0], true);
  launch.select(sizes, index, false);
  launch.compact(index);
  return {index.positions, index.lengths, index.cu_seqlens, index.overflow};
}

}  // namespace lkv::torch_ops
