#include "ragged.h"

namespace lkv::host {

int64_t check_append(const Problem& problem, const Ragged& cache, const Arrays& rows, int64_t position) {
  check_value(cache.rows.size() == problem.payloads.size(), "expected ", cache.rows.size(),
              " tensors of new rows, one for each of the cache, got ", problem.payloads.size());
  const int64_t tokens = cache.positions->numel();
  check_value(tokens <= kMost, "expected a cache of at most 2**31 - 1 rows, got ", tokens);
  check_value(position >= 0 && position <= kMost - problem.longest,
              "expected at most 2**31 - 1 tokens, as positions are int32, got ", problem.longest, " after ", position);
  std::vector<Named> written;
  for (size_t p = 0; p < cache.rows.size(); ++p) {
    const Payload& like = problem.payloads[p];
    const Name fresh("payload", static_cast<int64_t>(p));
    const Array& array = cache.rows[p];
    written.push_back({array, {"cache", static_cast<int64_t>(p)}});
    check_device(written.back(), problem.device);
    check_type(array.dtype == like.dtype, "expected ", fresh, " of the cache's dtype ", describe_dtype(array), ", got ",
               describe_dtype(rows[p]));
    Shape expected = problem.output_shape(tokens, -1, like.trailing);
    check_value(array.shape() == expected && array.is_contiguous(), "expected ", fresh,
                " with rows like those of the cache, ", array.shape(), ", got ", rows[p].shape());
  }
  const auto check_index = [&](const Array& array, const char* name, const Shape& expected, const char* dims) {
    check_device({array, name}, problem.device);
    check_int32({array, name}, expected, dims);
  };
  check_index(*cache.positions, "cache.positions", {tokens}, "[T]");
  check_index(cache.lengths, "cache.lengths", problem.lengths_shape(), "[B, H]");
  check_index(cache.cu_seqlens, "cache.cu_seqlens", {problem.rows() + 1}, "[B * H + 1]");
  written.push_back({*cache.positions, "cache.positions"});
  written.push_back({cache.lengths, "cache.lengths"});
  std::vector<Named> read = named(rows, "payload");
  read.push_back({cache.cu_seqlens, "cache.cu_seqlens"});
  check_disjoint(written, read);
  return tokens;
}

namespace {

// What does not depend on where the rows lie: [T, D] or, in pages, [P, page, D].
AttendParams check_queries(const Array& q, const Named& k, const Named& v, const Array& lengths,
                           const std::optional<Array>& sinks, int64_t longest, bool in_pages) {
  const Named query{q, "q"}, used{lengths, "lengths"};
  const int64_t token = in_pages ? 1 : 0;
  check_value(q.rank == 4, "expected q of shape [B, Hq, n, D], got ", q.shape());
  check_value(lengths.rank == 2, "expected lengths of shape [B, H], got ", lengths.shape());
  AttendParams p{};
  p.batch = lengths.sizes[0];
  p.heads = lengths.sizes[1];
  const int64_t query_heads = q.sizes[1];
  p.group = p.heads == 0 ? 0 : query_heads / p.heads;
  check_value(q.sizes[0] == p.batch && p.group * p.heads == query_heads,
              "expected q of shape [B, Hq, n, D] with B = ", p.batch, " and Hq a multiple of H = ", p.heads, ", got ",
              q.shape());
  p.queries = q.sizes[2];
  p.dim = q.sizes[3];
  p.type = check_scores_dtype(query);
  p.k_type = check_scores_dtype(k);
  p.v_type = check_scores_dtype(v);
  for (const Named& rows : {k, v}) {
    check_device(rows, q.device);
    check_value(rows.array.rank == token + 2, "expected ", rows.name, " of shape ",
                in_pages ? "[P, page, D]" : "[T, D]", ", got ", rows.array.shape());
  }
  const int64_t dim = k.array.sizes[token + 1];
  check_value(dim == p.dim, "expected q with rows of D = ", dim, " as in k, got ", q.shape());
  check_value(longest >= 0, "expected max_length of at least 0, got ", longest);
  p.dim_v = v.array.sizes[token + 1];
  check_device(used, q.device);
  check_int32(used, {p.batch, p.heads}, "[B, H]");
  p.q = row_layout(query, 2).strided;
  p.k = row_layout(k, token).strided;
  p.v = row_layout(v, token).strided;
  p.lengths = reinterpret_cast<const int32_t*>(lengths.data);
  if (sinks) {
    const Named named_sinks{*sinks, "sinks"};
    check_device(named_sinks, q.device);
    p.sinks_type = check_scores_dtype(named_sinks);
    check_value(sinks->shape() == Shape{query_heads}, "expected sinks of shape [Hq] = ", Shape{query_heads}, ", got ",
                sinks->shape());
    check_value(sinks->is_contiguous(), "expected sinks contiguous");
    p.sinks = sinks->data;
  }
  return p;
}

}  // namespace

AttendParams check_attend(const Array& q, const Ragged& cache, const std::optional<Array>& sinks, int64_t longest) {
  const Array &k = cache.rows[0], &v = cache.rows[1];
  AttendParams p = check_queries(q, {k, "k"}, {v, "v"}, cache.lengths, sinks, longest, false);
  check_value(v.sizes[0] == k.sizes[0], "expected v of shape [T, Dv] with T = ", k.sizes[0], ", got ", v.shape());
  p.tokens = k.sizes[0];
  check_value(p.tokens <= kMost, "expected k of at most 2**31 - 1 rows, got ", k.shape());
  p.longest = std::min(longest, p.tokens);
  const Named offsets{cache.cu_seqlens, "cu_seqlens"};
  check_device(offsets, q.device);
  check_int32(offsets, {p.batch * p.heads + 1}, "[B * H + 1]");
  p.cu_seqlens = reinterpret_cast<const int32_t*>(cache.cu_seqlens.data);
  return p;
}

std::pair<AttendParams, Pages> check_attend_paged(const Array& q, const Paged& cache, const std::optional<Array>& sinks,
                                                  int64_t longest) {
  const Array &k = cache.pools[0], &v = cache.pools[1];
  AttendParams p = check_queries(q, {k, "k"}, {v, "v"}, cache.lengths, sinks, longest, true);
  check_value(v.sizes[0] == k.sizes[0] && v.sizes[1] == k.sizes[1],
              "expected v of shape [P, page, Dv] with [P, page] = ", Shape{k.sizes[0], k.sizes[1]}, " as in k, got ",
              v.shape());
  check_value(cache.tables.rank == 3, "expected tables of shape [B, H, M], got ", cache.tables.shape());
  const Pages pages = read_table({k, "k"}, {cache.tables, "tables"}, p.batch, p.heads, q.device);
  const int64_t columns = cache.tables.sizes[2];
  p.longest = std::min(longest, kMost);  // lengths are int32
  if (p.longest >> pages.shift >= columns) p.longest = columns << pages.shift;
  return {p, pages};
}

}  // namespace lkv::host
