#include <algorithm>
#include <cmath>
#include <limits>

#include "row_kernels.h"

// The passes of soft_topk over a row of double: for gradcheck, not for speed.

namespace lkv::cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

const double* doubles(const void* p) {
  return static_cast<const double*>(p);
}

SoftRange range(const void* scores, int64_t n) {
  SoftRange range = {kInfinity, -kInfinity, 0, 0, 0, 0, 0};
  if (n > 0 && std::isfinite(doubles(scores)[0])) range.origin = doubles(scores)[0];
  for (int64_t i = 0; i < n; ++i) {
    const double score = doubles(scores)[i];
    range.infinite += score == kInfinity;
    if (!std::isfinite(score)) continue;
    range.finite += 1;
    range.lowest = std::min(range.lowest, score);
    range.highest = std::max(range.highest, score);
    range.sum += score - range.origin;
    range.squares += (score - range.origin) * (score - range.origin);
  }
  return range;
}

SoftSums pass(const SoftPass& p) {
  SoftSums sums = {};
  for (int64_t i = 0; i < p.n; ++i) {
    const double score = doubles(p.scores)[i];
    const double u = std::isnan(score) ? -kInfinity : (score - p.tau) / p.temperature;
    const double e = std::exp(-std::abs(u)), large = 1 / (1 + e), small = e / (1 + e);
    const double m = u < 0 ? small : large, rest = u < 0 ? large : small;
    sums.m += m;
    sums.rest += rest;
    sums.w += m * rest;
    sums.tilt += m * rest * (rest - m);
    if (p.out == nullptr) continue;
    static_cast<double*>(p.out)[i] = p.log ? std::min(u, 0.0) - std::log1p(e) : m;
  }
  return sums;
}

struct Slope {
  double a, w, u;
};

Slope slope(const SoftGrad& p, int64_t i) {
  const double value = doubles(p.mask)[i], grad = doubles(p.grad)[i];
  if (value == (p.log ? -kInfinity : 0)) return {};
  const double m = p.log ? std::exp(value) : value, rest = p.log ? -std::expm1(value) : 1 - value;
  if (rest <= 0) return {};
  const double u = (p.log ? value : std::log(value)) - std::log(rest);
  return {p.log ? grad * rest : grad * m * rest, m * rest, u};
}

SoftGradSums sum_grad(const SoftGrad& p, bool) {
  SoftGradSums sums = {};
  for (int64_t i = 0; i < p.n; ++i) {
    const Slope x = slope(p, i);
    sums.a += x.a;
    sums.au += x.a * x.u;
    sums.wu += x.w * x.u;
  }
  return sums;
}

void write_grad(const SoftGrad& p) {
  for (int64_t i = 0; i < p.n; ++i) {
    const Slope x = slope(p, i);
    static_cast<double*>(p.out)[i] = (x.a - x.w * p.mean) / p.temperature;
  }
}

void nudge(void* mask, int64_t n, double move) {
  for (double* m = static_cast<double*>(mask); n > 0; --n, ++m) {
    *m -= *m * (1 - *m) * move * (1 - (0.5 - *m) * move);
  }
}

}  // namespace

constinit const SoftKernels soft_double_kernels = {range, pass, sum_grad, write_grad, nudge};

}  // namespace lkv::cpu
