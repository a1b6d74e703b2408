#include "ops.h"

namespace lkv::torch_ops {

void add_index(Tensors& list, const host::Problem& problem, const host::Sizes& sizes, const Tensor& like,
               bool count_overflow) {
  list.push_back(empty_int32(problem.output_shape(sizes.total, sizes.padded, {}), like));
  list.push_back(empty_int32(problem.lengths_shape(), like));
  list.push_back(empty_int32({problem.rows() + 1}, like));
  if (count_overflow) list.push_back(empty_int32({}, like));
}

Tensors select(Tensors scores, LKV_SIZE_PARAMETERS) {
  const host::Sizes sizes = LKV_SIZES;
  host::Problem problem({}, view(scores), LKV_LAYOUT(static_cast<int64_t>(scores.size())));
  problem.read_sizes(sizes);
  Tensors index;
  add_index(index, problem, sizes, scores[0], count_overflow);
  Launch(problem, nullptr, scores[0], true).select(sizes, pointers(index.data(), count_overflow));
  return index;
}

}  // namespace lkv::torch_ops
