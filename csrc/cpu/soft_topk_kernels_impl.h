#pragma once

#include "soft_topk_grad_impl.h"

// The passes of soft_topk over a row, over a vector type S; one file per instruction set includes it, internal linkage
// as in key_kernels_impl.h.

namespace lkv::cpu {
namespace {

template <class S, ScoreType type>
struct Soft {
  using Floats = typename S::Floats;
  using E = Elements<type>;
  using Item = typename E::Item;

  static Floats load(const Item* scores) { return S::fmax(E::template load<S>(scores), S::fset(kMissing)); }

  static SoftRange range(const void* scores, int64_t n) {
    const Item* items = static_cast<const Item*>(scores);
    const auto zero = S::fset(0.0f), one = S::fset(1.0f), missing = S::fset(kMissing), most = S::fset(kLargest);
    const auto infinite = S::fset(-kMissing), least = S::fset(-kLargest);
    const float first = n > 0 ? to_float<type>(items[0]) : 0.0f;
    SoftRange range = {};
    range.origin = first >= -kLargest && first <= kLargest ? first : 0.0f;
    const auto origin = S::fset(static_cast<float>(-range.origin));
    auto lowest = infinite, highest = missing, sum = zero, squares = zero, present = zero, above = zero;
    const auto add = [&](Floats x) {
      const auto below = S::where_below(x, least, infinite, x), upto = S::where_below(most, x, missing, x);
      lowest = S::fmin(lowest, below);
      highest = S::fmax(highest, upto);
      present = S::fadd(present, S::zero_below(one, x, least));
      above = S::fadd(above, S::where_below(most, x, one, zero));
      auto offset = S::fadd(x, origin);
      offset = S::where_below(x, least, zero, S::where_below(most, x, zero, offset));
      sum = S::fadd(sum, offset);
      squares = S::fma(offset, offset, squares);
    };
    const auto flush = [&] {
      const auto infinities = static_cast<int64_t>(S::sum(above));
      range.infinite += infinities;
      range.finite += static_cast<int64_t>(S::sum(present)) - infinities;
      range.sum += S::sum(sum);
      range.squares += S::sum(squares);
      sum = squares = present = above = zero;
    };
    const int64_t at = Vectors<S>::for_each_vector(n, [&](int64_t i) { add(load(items + i)); }, flush);
    if (at < n) {
      Item rest[S::width];
      Vectors<S>::load_rest(items + at, n - at, from_float<type>(kMissing), rest);
      add(load(rest));
      flush();
    }
    range.highest = S::highest(highest);
    range.lowest = -S::highest(S::fmul(lowest, S::fset(-1.0f)));
    return range;
  }

  // At one score: e = e^-u, m = 1 / (1 + e), and rest = 1 - m without cancellation.
  struct Point {
    Floats power, e, sum, m, rest;

    // `below` is -tau, `slope` -1 / (temperature * ln 2): of NaN comes m = 0.
    Point(Floats score, Floats below, Floats slope, Floats shift) {
      power = S::fma(S::fadd(score, below), slope, shift);
      e = power_of_two<S>(power);
      sum = S::fadd(e, S::fset(1.0f));
      m = S::fdiv(S::fset(1.0f), sum);
      rest = S::fmin(S::fmul(e, m), S::fset(1.0f));
    }

    // log m = -log(1 + e), with what 1 + e has lost of e; u itself where that is out of reach.
    Floats log() const {
      const auto minus_u = S::fmul(S::fmin(power, S::fset(-kMissing)), S::fset(static_cast<float>(kLn2)));
      const auto lost = S::fma(S::fadd(sum, S::fset(-1.0f)), S::fset(-1.0f), e);
      const auto l = S::zero_below(S::fma(lost, m, log_normal<S>(sum)), minus_u, S::fset(-kFarthest));
      return S::fmul(S::fmax(l, minus_u), S::fset(-1.0f));
    }
  };

  static constexpr double kLn2 = 0.693147180559945309;

  enum class Out { none, mask, log };

  template <Out out>
  static SoftSums run(const SoftPass& p) {
    const Item* items = static_cast<const Item*>(p.scores);
    float* to = static_cast<float*>(p.out);
    // tau in two parts: near it, differences are exact.
    const float high = static_cast<float>(p.tau);
    const double slope = 1 / (p.temperature * kLn2);
    const auto tau = S::fset(-high), scale = S::fset(static_cast<float>(-slope));
    const auto shift = S::fset(static_cast<float>((p.tau - static_cast<double>(high)) * slope));
    const auto zero = S::fset(0.0f);
    auto m = zero, rest = zero, w = zero, tilt = zero;
    SoftSums sums = {};
    const auto write = [&](const Point& x, float* at) {
      if constexpr (out == Out::mask) S::fstore(at, x.m);
      if constexpr (out == Out::log) S::fstore(at, x.log());
    };
    const int64_t at = Vectors<S>::for_each_vector(
        p.n,
        [&](int64_t i) {
          const auto score = E::template load<S>(items + i);
          const Point x(score, tau, scale, shift);
          const auto weight = S::fmul(x.m, x.rest);
          m = S::fadd(m, x.m);
          rest = S::fadd(rest, x.rest);
          w = S::fadd(w, weight);
          tilt = S::fma(weight, S::fsub(x.rest, x.m), tilt);
          write(x, to + i);
        },
        [&] {
          sums.m += S::sum(m);
          sums.rest += S::sum(rest);
          sums.w += S::sum(w);
          sums.tilt += S::sum(tilt);
          m = rest = w = tilt = zero;
        });
    if (at < p.n) {
      Item scores[S::width];
      float ms[S::width], rests[S::width], written[S::width];
      Vectors<S>::load_rest(items + at, p.n - at, from_float<type>(kMissing), scores);
      const Point x(E::template load<S>(scores), tau, scale, shift);
      S::fstore(ms, x.m);
      S::fstore(rests, x.rest);
      for (int64_t i = 0; i < p.n - at; ++i) {
        const double a = ms[i], b = rests[i];
        sums.m += a;
        sums.rest += b;
        sums.w += a * b;
        sums.tilt += a * b * (b - a);
      }
      write(x, written);
      if (out != Out::none) memcpy(to + at, written, static_cast<size_t>(p.n - at) * sizeof(float));
    }
    return sums;
  }

  // Sums of m, its squares and its cubes tell the rest.
  static SoftSums rough(const SoftPass& p) {
    const Item* items = static_cast<const Item*>(p.scores);
    const double slope = 1 / (p.temperature * kLn2);
    const auto tau = S::fset(static_cast<float>(-p.tau)), scale = S::fset(static_cast<float>(-slope));
    const auto zero = S::fset(0.0f), one = S::fset(1.0f);
    auto m = zero, squares = zero, cubes = zero, odd = zero;
    double sums[3] = {};
    const auto add = [&](Floats score) {
      const auto e = power_of_two<S, true>(S::fmul(S::fadd(score, tau), scale));
      const auto x = S::inverse(S::fadd(e, one)), square = S::fmul(x, x);
      m = S::fadd(m, x);
      squares = S::fadd(squares, square);
      cubes = S::fma(square, x, cubes);
    };
    const auto flush = [&] {
      sums[0] += S::sum(m);
      sums[1] += S::sum(squares);
      sums[2] += S::sum(cubes);
      m = squares = cubes = zero;
    };
    const int64_t at = Vectors<S>::for_each_vector(
        p.n,
        [&](int64_t i) {
          const auto score = E::template load<S>(items + i);
          odd = S::fma(score, zero, odd);  // NaN where it is not finite
          add(score);
        },
        flush);
    if (at < p.n) {
      Item rest[S::width];
      Vectors<S>::load_rest(items + at, p.n - at, from_float<type>(kMissing), rest);
      for (int64_t i = at; i < p.n; ++i) odd = S::fma(S::fset(to_float<type>(items[i])), zero, odd);
      add(E::template load<S>(rest));
      flush();
    }
    const double w = sums[0] - sums[1];
    return {sums[0], static_cast<double>(p.n) - sums[0], w, w - 2 * (sums[1] - sums[2]), S::sum(odd) == 0};
  }

  static SoftSums pass(const SoftPass& p) {
    if (p.rough) return rough(p);
    if (p.out == nullptr) return run<Out::none>(p);
    return p.log ? run<Out::log>(p) : run<Out::mask>(p);
  }
};

template <class S>
void nudge_mask(void* mask, int64_t n, double move) {
  float* masks = static_cast<float*>(mask);
  const float step = static_cast<float>(move);
  const auto by = S::fset(-step), half = S::fset(1 - 0.5f * step), one = S::fset(1.0f), minus = S::fset(-1.0f);
  const auto moved = [&](auto m) {
    const auto w = S::fmul(m, S::fma(m, minus, one));
    return S::fma(S::fmul(w, by), S::fma(m, S::fset(step), half), m);
  };
  int64_t at = 0;
  for (; at + S::width <= n; at += S::width) S::fstore(masks + at, moved(S::fload(masks + at)));
  if (at < n) {
    float rest[S::width] = {};
    memcpy(rest, masks + at, static_cast<size_t>(n - at) * sizeof(float));
    S::fstore(rest, moved(S::fload(rest)));
    memcpy(masks + at, rest, static_cast<size_t>(n - at) * sizeof(float));
  }
}

template <class S, ScoreType type>
constexpr SoftKernels soft_kernels() {
  return {Soft<S, type>::range, Soft<S, type>::pass, sum_soft_grad<S>, write_soft_grad<S, type>, nudge_mask<S>};
}

}  // namespace
}  // namespace lkv::cpu
