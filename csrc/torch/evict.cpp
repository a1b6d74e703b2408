#include "ops.h"

namespace lkv::torch_ops {

void add_outputs(Tensors& list, const host::Problem& problem, const Tensors& payload, int64_t total, int64_t padded) {
  for (size_t p = 0; p < problem.payloads.size(); ++p) {
    const host::Payload& like = problem.payloads[p];
    list.push_back(empty_output(problem.output_shape(total, padded, like.trailing), static_cast<int32_t>(like.dtype),
                                payload[p * problem.layers]));
  }
}

namespace {

// `out`: the moved payload, then the index.
void run(host::Problem& problem, const host::Sizes& sizes, const Tensors& out, bool count_overflow, bool warm) {
  const Tensor* const index = out.data() + problem.payloads.size();
  Launch(problem, out.data(), *index, true).evict(sizes, pointers(index, count_overflow), warm);
}

Tensors evict_new(const Tensors& payload, const Tensors& scores, const host::Sizes& sizes, const host::Layout& layout,
                  bool count_overflow) {
  host::Problem problem(view(payload), view(scores), layout);
  problem.read_sizes(sizes);
  Tensors out;
  out.reserve(problem.payloads.size() + 4);
  add_outputs(out, problem, payload, sizes.total, sizes.padded);
  add_index(out, problem, sizes, scores[0], count_overflow);
  run(problem, sizes, out, count_overflow, false);
  return out;
}

using InPlace = std::tuple<Tensor, Tensor, Tensor, Tensor>;

InPlace run_in_place(host::Problem& problem, const host::Sizes& sizes, const Tensor& like, bool count_overflow) {
  Tensors index;
  add_index(index, problem, sizes, like, count_overflow);
  host::IndexPointers where = pointers(index.data(), count_overflow);
  int32_t* const filled = where.positions;
  std::optional<Tensor> ascending;  // what select writes, where the positions come out in another order
  if (sizes.any_order) where.positions = data<int32_t>(ascending.emplace(empty_int32({sizes.total}, like)));
  Launch launch(problem, nullptr, like, true);
  launch.select(sizes, where);
  launch.compact(sizes, where, filled);
  return {index[0], index[1], index[2], count_overflow ? index[3] : empty_int32({0}, like)};
}

}  // namespace

Tensors evict(Tensors payload, Tensors scores LKV_PARAMETERS) {
  Arguments given = LKV_GIVEN;
  return evict_new(payload, scores, given.take_sizes(), given.layout(scores.size()), given.count_overflow);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> evict_plain(Tensor k, Tensor v, Tensor scores,
                                                               std::vector<int64_t> budgets, int64_t total) {
  host::Sizes sizes{};
  sizes.budgets.host = std::move(budgets);
  sizes.total = total;
  sizes.padded = sizes.max_budget = -1;
  sizes.align = 1;
  Tensors out = evict_new({std::move(k), std::move(v)}, {std::move(scores)}, sizes, {1, 0, 0, std::nullopt}, false);
  return {std::move(out[0]), std::move(out[1]), std::move(out[2]), std::move(out[3]), std::move(out[4])};
}

void evict_out(Tensors out, Tensors payload, Tensors scores LKV_PARAMETERS) {
  Arguments given = LKV_GIVEN;
  const host::Sizes sizes = given.take_sizes();
  const host::Arrays sources = view(payload), ranking = view(scores), written = view(out);
  host::Problem problem(sources, ranking, given.layout(scores.size()));
  problem.read_sizes(sizes);
  const size_t moved = problem.payloads.size();
  host::check_value(out.size() == moved + (given.count_overflow ? 4 : 3), "expected ",
                    moved + (given.count_overflow ? 4 : 3), " tensors in out",
                    given.count_overflow ? ", overflow among them" : ", no overflow", ", got ", out.size());
  const host::Array* const index = written.data() + moved;
  host::check_outputs(problem, sizes,
                      {{written.begin(), written.begin() + moved},
                       index[0],
                       index[1],
                       index[2],
                       given.count_overflow ? std::optional(index[3]) : std::nullopt},
                      sources, ranking);
  for (size_t i = 0; i < out.size(); ++i) {
    constexpr const char* kIndex[] = {"out.positions", "out.lengths", "out.cu_seqlens", "out.overflow"};
    mark_written(out[i], i < moved ? host::Name("out", static_cast<int64_t>(i)) : kIndex[i - moved]);
  }
  run(problem, sizes, out, given.count_overflow, true);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> evict_(Tensors payload, Tensors scores LKV_PARAMETERS) {
  Arguments given = LKV_GIVEN;
  const host::Sizes sizes = given.take_sizes();
  const host::Arrays moved = view(payload), ranking = view(scores);
  host::Problem problem(moved, ranking, given.layout(scores.size()));
  problem.read_sizes(sizes);
  host::check_in_place(problem, sizes, moved, ranking);
  mark_written(payload, "payload");
  return run_in_place(problem, sizes, scores[0], given.count_overflow);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> evict_paged_(Tensors pools, Tensors scores,
                                                                Tensors tables LKV_PARAMETERS) {
  Arguments given = LKV_GIVEN;
  const host::Sizes sizes = given.take_sizes();
  const host::Arrays moved = view(pools), ranking = view(scores), ids = view(tables);
  host::Problem problem({}, ranking, given.layout(scores.size()));
  problem.read_sizes(sizes);
  problem.read_pages(moved, ids);
  host::check_in_pages(problem, sizes, moved, ids, ranking);
  mark_written(pools, "payload");
  const Tensor free_pages = empty_int32({problem.free_counts()}, scores[0]);
  problem.count_free_pages(data<int32_t>(free_pages));
  return std::tuple_cat(run_in_place(problem, sizes, scores[0], given.count_overflow), std::tuple(free_pages));
}

}  // namespace lkv::torch_ops
