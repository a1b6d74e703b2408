#include "problem.h"

namespace lkv::host {

namespace {

Name indexed(const char* name, size_t i, bool many) {
  return {name, many ? static_cast<int64_t>(i) : -1};
}

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

Problem::Problem(const Arrays& payload, const Arrays& score_list, const Layout& layout)
    : layers(layout.layers), batch(layout.batch), heads(layout.heads), offsets(layout.cu_seqlens) {
  const bool from_payload = !payload.empty();
  const Arrays& first = from_payload ? payload : score_list;
  check_value(layers > 0 && !first.empty() && payload.size() % layers == 0 &&
                  (score_list.empty() || score_list.size() == static_cast<size_t>(layers)),
              "expected one tensor per layer in every list, got ", payload.size(), " payload and ", score_list.size(),
              " score tensors for ", layers, " layers");
  device = first[0].device;
  if (offsets) {
    const Named cu{*offsets, "cu_seqlens"};
    check_device(cu, device);
    check_value(layers == 1, "expected one layer of ragged rows, got ", layers);
    check_rows();
    check_int32(cu, {rows() + 1}, "[B * H + 1]");
    cu_seqlens = reinterpret_cast<const int32_t*>(cu.array.data);
  } else {
    read_shape({first[0], from_payload ? "payload[0]" : indexed("scores", 0, layers > 1)});
    check_rows();
  }

  std::vector<int64_t> token_counts(layers, -1), bytes;
  const std::vector<Strided> input_rows = read_rows(payload, "payload", token_counts);
  for (size_t i = 0; i < payload.size(); i += layers) {
    const RowLayout head = row_layout({payload[i], ""}, cu_seqlens != nullptr ? 0 : 2);
    payloads.push_back({head.trailing, payload[i].dtype, payload[i].itemsize, head.row_bytes});
    bytes.push_back(head.row_bytes);
  }
  const std::vector<Strided> score_rows = read_rows(score_list, "scores", token_counts);
  for (size_t n = 0; n < score_list.size(); ++n) {
    const Named named{score_list[n], indexed("scores", n, layers > 1)};
    const ScoreType type = check_scores_dtype(named);
    check_type(n == 0 || type == score_type, "expected ", named.name, " of the same dtype as scores[0]");
    score_type = type;
  }
  longest = *std::max_element(token_counts.begin(), token_counts.end());
  tokens = tables.add(token_counts);
  scores = tables.add(score_rows);
  inputs = tables.add(input_rows);
  row_bytes = tables.add(bytes);
}

void Problem::read_shape(const Named& first) {
  if (first.array.rank < 3)
    fail("ValueError", "expected ", first.name, " of shape [B, H, L, ...], got ", first.array.shape());
  batch = first.array.sizes[0];
  heads = first.array.sizes[1];
}

// Segments are counted in 32 bits, as rows are. Each factor first, so that the product does not overflow.
void Problem::check_rows() const {
  const bool fits = batch >= 0 && heads >= 0 && batch <= kMost && heads <= kMost && layers <= kMost;
  check_value(fits && batch * heads <= kMost / layers,
              "expected at most 2**31 - 1 heads of all sequences and layers, got ", Shape{layers, batch, heads});
}

// Checks the arrays of a list against the shape and against each other; fills in the token counts of the layers.
std::vector<Strided> Problem::read_rows(const Arrays& list, const char* name, std::vector<int64_t>& token_counts) {
  const bool ragged = cu_seqlens != nullptr, is_scores = name[0] == 's';
  const int64_t axes = ragged ? 1 : 3;
  std::vector<Strided> rows;
  rows.reserve(list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    const Named t{list[i], indexed(name, i, !is_scores || layers > 1)};
    const Array& array = t.array;
    check_device(t, device);
    int64_t& count = token_counts[i % layers];
    if (count < 0 && array.rank >= axes) count = array.sizes[axes - 1];
    const int64_t expected[] = {batch, heads, count};
    const bool fits = array.rank >= axes && std::equal(expected + 3 - axes, expected + 3, array.sizes);
    if (!fits || (is_scores && array.rank != axes))
      fail("ValueError", "expected ", t.name, " of shape ", ragged ? "[T" : "[B, H, L",
           is_scores ? "] = " : ", ...] with ", Shape(expected + 3 - axes, expected + 3), ", got ", array.shape());
    check_value(count <= kMost, "expected ", t.name, " of at most 2**31 - 1 tokens, as positions are int32, got ",
                count);
    const Array& head = list[i - i % layers];
    if (!is_scores && i % layers != 0) {
      if (!std::equal(array.sizes + axes, array.sizes + array.rank, head.sizes + axes, head.sizes + head.rank))
        fail("ValueError", "expected ", t.name, " with rows like those of the first layer, ", head.shape(), ", got ",
             array.shape());
      check_type(array.dtype == head.dtype, "expected ", t.name, " of the dtype of the first layer");
    }
    rows.push_back(row_layout(t, axes - 1).strided);
  }
  return rows;
}

void Problem::read_sizes(const Sizes& sizes) {
  check_value(sizes.total >= 0 && sizes.total <= kMost, "expected at most 2**31 - 1 rows in the output, got ",
              sizes.total);
  check_value(sizes.padded < 0 || (sizes.padded <= kMost && sizes.total == rows() * sizes.padded),
              "expected a padded output of ", rows(), " spans of ", sizes.padded, " rows, got ", sizes.total, " rows");
  check_value(sizes.sink >= 0 && sizes.window >= 0, "expected sink and window of at least 0, got ", sizes.sink, " and ",
              sizes.window);
  check_value(sizes.reserve >= 0 && sizes.align >= 1, "expected reserve >= 0 and align >= 1, got ", sizes.reserve,
              " and ", sizes.align);
  check_value(sizes.reserve <= kMost && sizes.align <= kMost,
              "expected reserve and align of at most 2**31 - 1 rows, got ", sizes.reserve, " and ", sizes.align);
  check_value(sizes.back >= 0 && sizes.back <= kMost, "expected page in [1, 2**31 - 1], got ", sizes.back);
  budgets = read_ints(sizes.budgets, "budgets", layers > 1 ? "[N, H] or [N, B, H]" : "[H] or [B, H]", true, 0);
  lengths = read_ints(sizes.lengths, "lengths", "[B] or [B, H]", false, INT64_MAX);
  starts = read_ints(sizes.starts, "starts", "[B] or [B, H]", false, 0);
}

IntTable Problem::read_ints(const Ints& values, const char* name, const char* shapes, bool per_head, int64_t fallback) {
  if (values.array) {
    const Named t{*values.array, name};
    check_device(t, device);
    return {row_ints(t, layers, batch, heads), std::nullopt};
  }
  RowInts ints{nullptr, 0, 0, 0, fallback, true};
  const int64_t count = static_cast<int64_t>(values.host.size());
  if (count == 0) {
    check_value(!per_head || rows() == 0, "expected ", name, " of shape ", shapes, ", got none");
    return {ints, std::nullopt};
  }
  if (count == 1) {
    ints.fallback = values.host[0];
    return {ints, std::nullopt};
  }
  if (count == rows()) {
    ints.layer = batch * heads, ints.batch = heads, ints.head = 1;
  } else if (count == batch * heads) {
    ints.batch = heads, ints.head = 1;
  } else if (per_head && count == heads) {
    ints.head = 1;
  } else if (!per_head && count == batch) {
    ints.batch = 1;
  } else {
    fail("ValueError", "expected ", name, " of shape ", shapes, " with [N, B, H] = ", Shape{layers, batch, heads},
         ", got ", count, " values");
  }
  return {ints, tables.add(values.host)};
}

int64_t Problem::check_index(const Array& positions, const Array& offsets) const {
  const Named index[] = {{positions, "index.positions"}, {offsets, "index.cu_seqlens"}};
  for (const Named& a : index) check_device(a, device);
  const int64_t padded = positions.rank <= 1 ? -1 : positions.sizes[positions.rank - 1];
  check_int32(index[0], output_shape(positions.numel(), padded, {}), padded < 0 ? "[T']" : "[B, H, C]");
  check_int32(index[1], {rows() + 1}, "[B * H + 1]");
  return padded;
}

Shape Problem::lengths_shape() const {
  return layers > 1 ? Shape{layers, batch, heads} : Shape{batch, heads};
}

Shape Problem::output_shape(int64_t total, int64_t padded, const Shape& trailing) const {
  Shape shape = padded < 0 ? Shape{total} : lengths_shape();
  if (padded >= 0) shape.push_back(padded);
  shape.insert(shape.end(), trailing.begin(), trailing.end());
  return shape;
}

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

void check_in_pages(const Problem& problem, const Sizes& sizes, const Arrays& pools, const Arrays& tables,
                    const Arrays& scores) {
  std::vector<Named> read = read_beside(problem, sizes, scores);
  for (size_t i = 0; i < tables.size(); ++i) read.push_back({tables[i], table_name(i)});
  check_disjoint(named(pools, "payload"), read);
}

}  // namespace lkv::host
