#include "ops.h"

namespace lkv::torch_ops {

Index new_index(const Problem& problem, const Sizes& sizes, bool count_overflow) {
  return {empty_int32(problem.output_shape(sizes.total, sizes.padded, {}), problem.device),
          empty_int32(problem.lengths_shape(), problem.device), empty_int32({problem.rows() + 1}, problem.device),
          empty_int32(count_overflow ? Shape{} : Shape{0}, problem.device)};
}

IndexTuple select(Tensors scores, LKV_SIZE_PARAMETERS) {
  const Sizes sizes = LKV_SIZES;
  Problem problem({}, scores, LKV_LAYOUT(static_cast<int64_t>(scores.size())));
  problem.read_sizes(sizes);
  const Index index = new_index(problem, sizes, count_overflow);
  Launch(problem, {}, true).select(sizes, index, false);
  return {index.positions, index.lengths, index.cu_seqlens, index.overflow};
}

}  // namespace lkv::torch_ops
