#pragma once

#include <limits>

#include "float_kernels_impl.h"
#include "lkv/floats.h"
#include "row_kernels.h"

// The gradient of soft_topk over a row, over a vector type S, internal linkage as in key_kernels_impl.h; and how rows
// are walked.

namespace lkv::cpu {
namespace {

constexpr float kMissing = -std::numeric_limits<float>::infinity();  // what NaN counts as, too
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kFarthest = 87.0f;  // |u| beyond which e^-|u| would not be a normal number: m is 0 or 1 there

// A row as whole vectors and a rest.
template <class S>
struct Vectors {
  static constexpr int64_t kStretch = 64 * S::width;  // summed in float

  // body(at) for all whole vectors, flush() after every stretch. Returns where the rest begins.
  template <class Body, class Flush>
  static int64_t for_each_vector(int64_t n, Body&& body, Flush&& flush) {
    int64_t at = 0;
    while (at + S::width <= n) {
      const int64_t end = n - at < kStretch ? at + (n - at) / S::width * S::width : at + kStretch;
      for (; at < end; at += S::width) body(at);
      flush();
    }
    return at;
  }

  template <class T>
  static void load_rest(const T* from, int64_t rest, T filling, T (&to)[S::width]) {
    for (T& x : to) x = filling;
    memcpy(to, from, static_cast<size_t>(rest) * sizeof(T));
  }
};

// From a mask and its gradient to what the gradient of a score is made of.
template <class S, bool kLog>
struct SoftSlope {
  using Floats = typename S::Floats;
  Floats a, w, u;

  template <bool kWithU>
  static SoftSlope at(const float* mask, const float* grad) {
    SoftSlope x;
    const auto value = S::fload(mask), tiny = S::fset(1e-37f);
    const auto upstream = S::fload(grad), minus = S::fset(-1.0f), one = S::fset(1.0f);
    if constexpr (kLog) {
      const auto l = S::fmin(S::fmax(value, S::fset(-kFarthest)), S::fset(0.0f));
      const Exponential<S> e(l);
      const auto m = S::zero_below(e.value(), value, S::fset(-kFarthest));
      const auto rest = S::fmul(S::fma(e.scale, e.part, S::fadd(e.scale, minus)), minus);
      // Missing scores have no gradient, whatever the gradient of their mask is.
      x.a = S::zero_below(S::fmul(upstream, rest), value, S::fset(-kLargest));
      x.w = S::fmul(m, rest);
      if constexpr (kWithU) {
        x.u = S::fma(log_normal<S>(S::fmax(rest, tiny)), minus, S::fmax(value, S::fset(-1e30f)));
      }
    } else {
      const auto rest = S::fma(value, minus, one);
      x.w = S::fmul(value, rest);
      x.a = S::where_below(S::fset(0.0f), x.w, S::fmul(upstream, x.w), S::fset(0.0f));
      if constexpr (kWithU) {
        x.u = log_normal<S>(S::fdiv(S::fmax(value, tiny), S::fmax(rest, S::fset(1e-8f))));
      }
    }
    return x;
  }
};

template <class S, bool kLog>
struct SoftBack {
  using Floats = typename S::Floats;

  template <bool kWithU>
  static SoftGradSums sum(const SoftGrad& p) {
    const auto *mask = static_cast<const float*>(p.mask), *grad = static_cast<const float*>(p.grad);
    const auto zero = S::fset(0.0f);
    auto a = zero, au = zero, wu = zero;
    SoftGradSums sums = {};
    const auto add = [&](const float* m, const float* g) {
      const auto x = SoftSlope<S, kLog>::template at<kWithU>(m, g);
      a = S::fadd(a, x.a);
      if constexpr (kWithU) {
        au = S::fma(x.a, x.u, au);
        wu = S::fma(x.w, x.u, wu);
      }
    };
    const auto flush = [&] {
      sums.a += S::sum(a);
      sums.au += S::sum(au);
      sums.wu += S::sum(wu);
      a = au = wu = zero;
    };
    const int64_t at = Vectors<S>::for_each_vector(p.n, [&](int64_t i) { add(mask + i, grad + i); }, flush);
    if (at < p.n) {
      float masks[S::width], grads[S::width];
      Vectors<S>::load_rest(mask + at, p.n - at, kLog ? kMissing : 0.0f, masks);
      Vectors<S>::load_rest(grad + at, p.n - at, 0.0f, grads);
      add(masks, grads);
      flush();
    }
    return sums;
  }

  template <ScoreType type>
  static void write(const SoftGrad& p) {
    const auto *mask = static_cast<const float*>(p.mask), *grad = static_cast<const float*>(p.grad);
    auto* out = static_cast<typename ScoreTraits<type>::Bits*>(p.out);
    const auto mean = S::fset(static_cast<float>(-p.mean)), scale = S::fset(static_cast<float>(1 / p.temperature));
    const auto step = [&](const float* m, const float* g) {
      const auto x = SoftSlope<S, kLog>::template at<false>(m, g);
      return S::fmul(S::fma(x.w, mean, x.a), scale);
    };
    const auto store = [&](int64_t at, const float* values, int64_t count) {
      for (int64_t i = 0; i < count; ++i) out[at + i] = from_float<type>(values[i]);
    };
    float values[S::width];
    const int64_t at = Vectors<S>::for_each_vector(
        p.n,
        [&](int64_t i) {
          if constexpr (type == ScoreType::f32) {
            S::fstore(reinterpret_cast<float*>(out) + i, step(mask + i, grad + i));
          } else {
            S::fstore(values, step(mask + i, grad + i));
            store(i, values, S::width);
          }
        },
        [] {});
    if (at < p.n) {
      float masks[S::width], grads[S::width];
      Vectors<S>::load_rest(mask + at, p.n - at, kLog ? kMissing : 0.0f, masks);
      Vectors<S>::load_rest(grad + at, p.n - at, 0.0f, grads);
      S::fstore(values, step(masks, grads));
      store(at, values, p.n - at);
    }
  }
};

template <class S>
SoftGradSums sum_soft_grad(const SoftGrad& p, bool with_u) {
  if (p.log) return with_u ? SoftBack<S, true>::template sum<true>(p) : SoftBack<S, true>::template sum<false>(p);
  return with_u ? SoftBack<S, false>::template sum<true>(p) : SoftBack<S, false>::template sum<false>(p);
}

template <class S, ScoreType type>
void write_soft_grad(const SoftGrad& p) {
  p.log ? SoftBack<S, true>::template write<type>(p) : SoftBack<S, false>::template write<type>(p);
}

}  // namespace
}  // namespace lkv::cpu
