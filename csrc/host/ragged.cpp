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

AttendParams check_attend(const Array& q, const Ragged& cache, const std::optional<Array>& sinks, int64_t longest) {
  const Named query{q, "q"}, k{cache.rows[0], "k"}, v{cache.rows[1], "v"};
  check_value(q.rank == 4, "expected q of shape [B, Hq, n, D], got ", q.shape());
  check_value(cache.lengths.rank == 2, "expected lengths of shape [B, H], got ", cache.lengths.shape());
  AttendParams p{};
  p.batch = cache.lengths.sizes[0];
  p.heads = cache.lengths.sizes[1];
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
    check_value(rows.array.rank == 2, "expected ", rows.name, " of shape [T, D], got ", rows.array.shape());
  }
  check_value(k.array.sizes[1] == p.dim, "expected q with rows of D = ", k.array.sizes[1], " as in k, got ", q.shape());
  check_value(v.array.sizes[0] == k.array.sizes[0], "expected v of shape [T, Dv] with T = ", k.array.sizes[0], ", got ",
              v.array.shape());
  p.tokens = k.array.sizes[0];
  check_value(p.tokens <= kMost, "expected k of at most 2**31 - 1 rows, got ", k.array.shape());
  check_value(longest >= 0, "expected max_length of at least 0, got ", longest);
  p.longest = std::min(longest, p.tokens);
  p.dim_v = v.array.sizes[1];
  const Named offsets{cache.cu_seqlens, "cu_seqlens"}, lengths{cache.lengths, "lengths"};
  for (const Named& index : {offsets, lengths}) check_device(index, q.device);
  check_int32(offsets, {p.batch * p.heads + 1}, "[B * H + 1]");
  check_int32(lengths, {p.batch, p.heads}, "[B, H]");
  p.q = row_layout(query, 2).strided;
  p.k = row_layout(k, 0).strided;
  p.v = row_layout(v, 0).strided;
  p.cu_seqlens = reinterpret_cast<const int32_t*>(cache.cu_seqlens.data);
  p.lengths = reinterpret_cast<const int32_t*>(cache.lengths.data);
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

}  // namespace lkv::host
