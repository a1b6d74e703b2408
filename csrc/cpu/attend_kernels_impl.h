#pragma once

#include <limits>

#include "float_kernels_impl.h"
#include "row_kernels.h"

// Attention of a few queries over a stretch of rows, over a vector type S; one file per instruction set includes it,
// internal linkage as in key_kernels_impl.h.
//
// S: what float_kernels_impl.h needs; `chunks`: accumulators per query that fit in registers beside those of three
// other queries.

namespace lkv::cpu {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

// cap * tanh(x / cap).
template <class S>
auto soft_cap(typename S::Floats x, float cap) {
  const auto magnitude = S::fmax(x, S::fmul(x, S::fset(-1.0f)));
  const auto e = exp_negative<S>(S::fmul(magnitude, S::fset(-2.0f / cap)));
  const auto one = S::fset(1.0f);
  const auto t = S::fdiv(S::fma(e, S::fset(-1.0f), one), S::fadd(e, one));
  return S::copy_sign(S::fmul(t, S::fset(cap)), x);
}

// K and V, of one type each.
template <class S, class E>
struct AttendRowsOf {
  using Item = typename E::Item;

  // logits[q][row] of Q queries.
  template <int Q>
  static void dot(const AttendTile& t, int64_t query, int64_t first, int64_t rows, float* logits) {
    const int64_t dim = t.dim;
    for (int64_t row = 0; row < rows; ++row) {
      const auto* key = reinterpret_cast<const Item*>(t.k + (first + row) * t.k_stride);
      typename S::Floats sums[Q];
      for (int q = 0; q < Q; ++q) sums[q] = S::fset(0.0f);
      for (int64_t at = 0; at < dim; at += S::width) {
        const auto chunk = load_chunk<S, E>(key, at, dim);
        for (int q = 0; q < Q; ++q)
          sums[q] = S::fma(S::fload(t.queries + (query + q) * t.query_stride + at), chunk, sums[q]);
      }
      for (int q = 0; q < Q; ++q) logits[q * kAttendRows + row] = S::sum(sums[q]);
    }
  }

  // acc[q] += weights[q] * V for Q queries.
  template <int Q>
  static void add(const AttendTile& t, int64_t query, int64_t first, int64_t rows, const float* weights) {
    for (int64_t at = 0; at < t.acc_stride; at += S::width * S::chunks) {
      typename S::Floats acc[Q][S::chunks];
      for (int q = 0; q < Q; ++q)
        for (int c = 0; c < S::chunks; ++c)
          acc[q][c] = S::fload(t.acc + (query + q) * t.acc_stride + at + c * S::width);
      if (at + S::width * S::chunks <= t.dim_v) {
        for (int64_t row = 0; row < rows; ++row) {
          const auto* value = reinterpret_cast<const Item*>(t.v + (first + row) * t.v_stride) + at;
          typename S::Floats v[S::chunks];
          for (int c = 0; c < S::chunks; ++c) v[c] = E::template load<S>(value + c * S::width);
          for (int q = 0; q < Q; ++q) {
            const auto weight = S::fset(weights[q * kAttendRows + row]);
            for (int c = 0; c < S::chunks; ++c) acc[q][c] = S::fma(weight, v[c], acc[q][c]);
          }
        }
      } else {
        for (int64_t row = 0; row < rows; ++row) {
          const auto* value = reinterpret_cast<const Item*>(t.v + (first + row) * t.v_stride);
          for (int c = 0; c < S::chunks && at + c * S::width < t.dim_v; ++c) {
            const auto v = load_chunk<S, E>(value, at + c * S::width, t.dim_v);
            for (int q = 0; q < Q; ++q) acc[q][c] = S::fma(S::fset(weights[q * kAttendRows + row]), v, acc[q][c]);
          }
        }
      }
      for (int q = 0; q < Q; ++q)
        for (int c = 0; c < S::chunks; ++c)
          S::fstore(t.acc + (query + q) * t.acc_stride + at + c * S::width, acc[q][c]);
    }
  }
};

template <class S>
struct Attend {
  template <ScoreType type>
  using Rows = AttendRowsOf<S, Elements<type>>;
  using Dot = void (*)(const AttendTile&, int64_t query, int64_t first, int64_t rows, float* logits);
  using Add = void (*)(const AttendTile&, int64_t query, int64_t first, int64_t rows, const float* weights);

  // By ScoreType.
  template <int Q>
  static constexpr Dot dots[] = {Rows<ScoreType::f32>::template dot<Q>, Rows<ScoreType::f16>::template dot<Q>,
                                 Rows<ScoreType::bf16>::template dot<Q>};
  template <int Q>
  static constexpr Add adds[] = {Rows<ScoreType::f32>::template add<Q>, Rows<ScoreType::f16>::template add<Q>,
                                 Rows<ScoreType::bf16>::template add<Q>};

  // Logits become weights relative to the highest logit so far; what was summed before is rescaled to it.
  static void soften(const AttendTile& t, int64_t query, int64_t visible, float* logits) {
    if (t.softcap > 0) {
      for (int64_t row = 0; row < visible; row += S::width)
        S::fstore(logits + row, soft_cap<S>(S::fload(logits + row), t.softcap));
    }
    for (int64_t row = visible; row < kAttendRows; ++row) logits[row] = kNever;
    auto highest = S::fset(kNever);
    for (int64_t row = 0; row < kAttendRows; row += S::width) highest = S::fmax(S::fload(logits + row), highest);
    const float before = t.highest[query];
    float now = S::highest(highest);
    if (!(now > before)) now = before;
    const float base = now == kNever ? 0.0f : now;
    auto sum = S::fset(0.0f);
    for (int64_t row = 0; row < kAttendRows; row += S::width) {
      const auto weight = exp_negative<S>(S::fadd(S::fload(logits + row), S::fset(-base)));
      S::fstore(logits + row, weight);
      sum = S::fadd(sum, weight);
    }
    if (now != before) {
      float lanes[S::width];
      S::fstore(lanes, exp_negative<S>(S::fset(before - base)));
      const auto scale = S::fset(lanes[0]);
      float* acc = t.acc + query * t.acc_stride;
      for (int64_t at = 0; at < t.acc_stride; at += S::width) S::fstore(acc + at, S::fmul(S::fload(acc + at), scale));
      t.sum[query] *= lanes[0];
      t.highest[query] = now;
    }
    t.sum[query] += S::sum(sum);
  }

  template <int Q>
  static void step(const AttendTile& t, int64_t query, int64_t first, int64_t rows) {
    float logits[Q * kAttendRows] = {};
    dots<Q>[static_cast<int>(t.k_type)](t, query, first, rows, logits);
    for (int q = 0; q < Q; ++q) {
      const int64_t visible = t.visible[query + q] - first;
      soften(t, query + q, visible < 0 ? 0 : visible < rows ? visible : rows, logits + q * kAttendRows);
    }
    adds<Q>[static_cast<int>(t.v_type)](t, query, first, rows, logits);
  }

  static void run(const AttendTile& t) {
    for (int64_t first = 0; first < t.rows; first += kAttendRows) {
      const int64_t rows = t.rows - first < kAttendRows ? t.rows - first : kAttendRows;
      int64_t query = 0;
      for (; query + 4 <= t.count; query += 4) step<4>(t, query, first, rows);
      for (; query < t.count; ++query) step<1>(t, query, first, rows);
    }
  }
};

}  // namespace
}  // namespace lkv::cpu
