#include "host/ragged.h"
#include "ops.h"

namespace lkv::torch_ops {

void append_(Tensors cache, Tensor positions, Tensor lengths, Tensor cu_seqlens, Tensors rows, int64_t position,
             std::optional<std::vector<int64_t>> valid, std::optional<Tensor> valid_tensor) {
  const host::Arrays fresh = view(rows);
  host::Problem problem(fresh, {}, {1, 0, 0, std::nullopt});
  const host::IntTable counts =
      problem.read_ints(ints(std::move(valid), valid_tensor), "valid", "[B]", false, problem.longest);
  const int64_t tokens =
      host::check_append(problem, {view(cache), view(cu_seqlens), view(lengths), view(positions)}, fresh, position);
  mark_written(cache, "cache");
  mark_written(positions, "cache.positions");
  mark_written(lengths, "cache.lengths");
  Launch launch(problem, cache.data(), rows[0], false);
  AppendParams append = launch.append_params(counts);
  append.tokens = tokens;
  append.cu_seqlens = data<int32_t>(cu_seqlens);
  append.lengths = data<int32_t>(lengths);
  append.positions = data<int32_t>(positions);
  append.position = position;
  launch.append(append);
}

}  // namespace lkv::torch_ops
