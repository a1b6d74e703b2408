#include "outputs.h"

#include "overlap.h"

namespace lkv::host {

namespace {

// What an op reads beside the payload.
std::vector<Named> read_beside(const Problem& problem, const Sizes& sizes, const Arrays& scores) {
  std::vector<Named> read = named(scores, "scores", scores.size() > 1);
  for (const auto& [ints, name] :
       {std::pair(&sizes.budgets, "budgets"), {&sizes.lengths, "lengths"}, {&sizes.starts, "starts"}})
    if (ints->array) read.push_back({*ints->array, name});
  if (problem.offsets) read.push_back({*problem.offsets, "cu_seqlens"});
  return read;
}

}  // namespace

void check_outputs(const Problem& problem, const Sizes& sizes, const Outputs& out, const Arrays& payload,
                   const Arrays& scores) {
  std::vector<Named> written = named(out.moved, "out");
  check_value(written.size() == problem.payloads.size(), "expected ", problem.payloads.size(), " tensors in out, got ",
              written.size());
  for (size_t p = 0; p < written.size(); ++p) {
    const Payload& like = problem.payloads[p];
    const Array& array = written[p].array;
    const Shape expected = problem.output_shape(sizes.total, sizes.padded, like.trailing);
    check_device(written[p], problem.device);
    check_type(array.dtype == like.dtype && array.itemsize == like.itemsize, "expected ", written[p].name,
               " of the dtype of what moves into it");
    check_value(array.shape() == expected && array.is_contiguous(), "expected ", written[p].name,
                " contiguous of shape ", expected, ", got ", array.shape());
  }
  const auto check_index = [&](const Array& array, const char* name, const Shape& expected, const char* dims) {
    written.push_back({array, name});
    check_device(written.back(), problem.device);
    check_int32(written.back(), expected, dims);
  };
  check_index(out.positions, "out.positions", problem.output_shape(sizes.total, sizes.padded, {}), "[T']");
  check_index(out.lengths, "out.lengths", problem.lengths_shape(), "[B, H]");
  check_index(out.cu_seqlens, "out.cu_seqlens", {problem.rows() + 1}, "[B * H + 1]");
  if (out.overflow) check_index(*out.overflow, "out.overflow", {}, "[]");
  std::vector<Named> read = named(payload, "payload");
  for (const Named& beside : read_beside(problem, sizes, scores)) read.push_back(beside);
  check_disjoint(written, read);
}

void check_in_place(const Problem& problem, const Sizes& sizes, const Arrays& payload, const Arrays& scores) {
  check_disjoint(named(payload, "payload"), read_beside(problem, sizes, scores));
}

}  // namespace lkv::host
