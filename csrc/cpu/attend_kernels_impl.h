#pragma once

#include <cstring>
#include <limits>

#include "row_kernels.h"

// Attention of a few queries over a stretch of rows, over a vector type S; one file per instruction set includes it,
// internal linkage as in key_kernels_impl.h.
//
// S: Floats of `width` 32-bit lanes; fset, fload, fstore, fload of 16-bit types (from_bf16, from_f16), fma, fadd, fmul,
// fmax (the second operand where one is NaN), sum and highest over lanes, scale_by_exponent, zero_below; `chunks`:
// accumulators per query that fit in registers beside those of three other queries.

namespace lkv::cpu {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

template <ScoreType type>
struct Elements {
  using Item = typename ScoreTraits<type>::Bits;
  template <class S>
  static auto load(const Item* p) {
    if constexpr (type == ScoreType::f32) {
      return S::fload(reinterpret_cast<const float*>(p));
    } else if constexpr (type == ScoreType::f16) {
      return S::from_f16(p);
    } else {
      return S::from_bf16(p);
    }
  }
};

constexpr float kExp[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};

// e^x for x <= 0 within 2 ulp: 2^n e^r with |r| <= ln 2 / 2, the polynomial of Cephes' expf.
template <class S>
auto exp_negative(typename S::Floats x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  x = S::fmax(S::fset(-88.0f), x);
  const auto shifted = S::fma(x, S::fset(1.44269504088896341f), S::fset(kRound));
  const auto n = S::fadd(shifted, S::fset(-kRound));
  auto r = S::fma(n, S::fset(-0.693359375f), x);
  r = S::fma(n, S::fset(2.12194440e-4f), r);
  auto p = S::fset(1.9875691500e-4f);
  for (const float c : kExp) p = S::fma(p, r, S::fset(c));
  p = S::fadd(S::fma(p, S::fmul(r, r), r), S::fset(1.0f));
  return S::zero_below(S::scale_by_exponent(p, shifted), x, S::fset(-87.33f));
}

// cap * tanh(x / cap).
template <class S>
auto soft_cap(typename S::Floats x, float cap) {
  const auto magnitude = S::fmax(x, S::fmul(x, S::fset(-1.0f)));
  const auto e = exp_negative<S>(S::fmul(magnitude, S::fset(-2.0f / cap)));
  const auto one = S::fset(1.0f);
  const auto t = S::fdiv(S::fma(e, S::fset(-1.0f), one), S::fadd(e, one));
  return S::copy_sign(S::fmul(t, S::fset(cap)), x);
}

// The whole vectors of a row, then what is left of it, filled up with zeros.
template <class S, class E>
auto load_chunk(const typename E::Item* row, int64_t at, int64_t size) {
  if (at + S::width <= size) return E::template load<S>(row + at);
  typename E::Item rest[S::width] = {};
  memcpy(rest, row + at, static_cast<size_t>(size - at) * sizeof(rest[0]));
  return E::template load<S>(rest);
}

template <class S, class E>
struct Attend {
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
    dot<Q>(t, query, first, rows, logits);
    for (int q = 0; q < Q; ++q) {
      const int64_t visible = t.visible[query + q] - first;
      soften(t, query + q, visible < 0 ? 0 : visible < rows ? visible : rows, logits + q * kAttendRows);
    }
    add<Q>(t, query, first, rows, logits);
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
