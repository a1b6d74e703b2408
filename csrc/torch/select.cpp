#include "ops.h"

namespace lkv::torch_ops {

void add_index(Tensors& list, const host::Problem& problem, const host::Sizes& sizes, const Tensor& like,
               bool count_overflow) {
  list.push_back(empty_int32(problem.output_shape(sizes.total, sizes.padded, {}), like));
  list.push_back(empty_int32(problem.lengths_shape(), like));
  list.push_back(empty_int32({problem.rows() + 1}, like));
  if (count_overflow) list.push_back(empty_int32({}, like));
}

Tensors select(Tensors scores LKV_PARAMETERS) {
  Arguments given = LKV_GIVEN;
  const host::Sizes sizes = given.take_sizes();
  host::Problem problem({}, view(scores), given.layout(scores.size()));
  problem.read_sizes(sizes);
  Tensors index;
  add_index(index, problem, sizes, scores[0], given.count_overflow);
  Launch(problem, nullptr, scores[0], true).select(sizes, pointers(index.data(), given.count_overflow));
  return index;
}

}  // namespace lkv::torch_ops
