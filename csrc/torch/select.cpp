#include "ops.h"

namespace lkv::torch_ops {

Index new_index(const host::Problem& problem, const host::Sizes& sizes, const Tensor& like, bool count_overflow) {
  return {empty_int32(problem.output_shape(sizes.total, sizes.padded, {}), like),
          empty_int32(problem.lengths_shape(), like), empty_int32({problem.rows() + 1}, like),
          empty_int32(count_overflow ? Shape{} : Shape{0}, like)};
}

IndexTuple select(Tensors scores, LKV_SIZE_PARAMETERS) {
  const host::Sizes sizes = LKV_SIZES;
  host::Problem problem({}, view(scores), LKV_LAYOUT(static_cast<int64_t>(scores.size())));
  problem.read_sizes(sizes);
  const Index index = new_index(problem, sizes, scores[0], count_overflow);
  Launch(problem, {}, scores[0], true).select(sizes, index, false);
  return {index.positions, index.lengths, index.cu_seqlens, index.overflow};
}

}  // namespace lkv::torch_ops
