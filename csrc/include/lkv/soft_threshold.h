#pragma once

#include <cmath>
#include <cstdint>

#include "lkv/keys.h"

// Finds tau with Halley's method inside a bracket, from sums over the row that the kernels compute. CPU and GPU run the
// same code, in double.

namespace lkv {

// Statistics of the finite scores of a row; moments are about `origin`. Scores of +inf are counted separately, and -inf
// and NaN are left out.
struct SoftRange {
  double lowest, highest, sum, squares, origin;
  int64_t finite, infinite;
};

// Sums over a row at one tau, with w = m (1 - m).
struct SoftSums {
  double m, rest;  // of m, and of 1 - m
  double w, tilt;  // of w, and of w (1 - 2 m)
  bool finite;     // all scores are finite; set on the CPU only
};

// Math has inverse, log and root of doubles. CUDA has its own, because a double division is a function call there.
struct HostMath {
  static double inverse(double x) { return 1 / x; }
  static double log(double x) { return std::log(x); }
  static double root(double x) { return std::sqrt(x); }
};

// How exact tau must be.
//   tolerance: of the sum, relative to the smaller of k and what is left of the row.
//   resolution: the smallest step that is taken, in units of the temperature.
//   close: a step after which the next one of Halley's lands within rounding, as the error is cubic; in the same units.
struct SoftPrecision {
  double tolerance, resolution, close;
};

LKV_HD SoftPrecision soft_precision(bool wide) {
  return wide ? SoftPrecision{1e-14, 0x1p-50, 1e-5} : SoftPrecision{1e-6, 0x1p-22, 1e-2};
}

template <class Math = HostMath>
class SoftThreshold {
 public:
  // What a step made of tau. near: it moved by `move` temperatures and needs no further step.
  enum State { far, near, good };

  double tau, move, weight;  // weight: the sum of w at tau, once tau is near or good

  // Whether k leaves nothing to decide: all finite scores are kept, or none. Such a row has no tau.
  LKV_HD static bool decided(const SoftRange& range, double k) {
    const double kept = k - static_cast<double>(range.infinite);
    return !(kept > 0 && kept < static_cast<double>(range.finite));
  }

  // `count`: how many scores are summed over; those that are missing are included and have m = 0.
  LKV_HD void start(const SoftRange& range, int64_t count, double k, double temperature) {
    k_ = k;
    rest_ = static_cast<double>(count) - k;
    temperature_ = temperature;
    const double n = static_cast<double>(range.finite), kept = k - static_cast<double>(range.infinite);
    const double logit = Math::log(kept * Math::inverse(n - kept)), each = Math::inverse(n);
    // At low_ every mask is at least the mean, kept / n; at high_ at most.
    low_ = range.lowest - temperature * logit;
    high_ = range.highest - temperature * logit;
    width_ = high_ - low_;
    steps_ = 0;
    // The first guess treats scores, with the noise that the temperature adds, as one logistic distribution.
    const double mean = range.sum * each, variance = range.squares * each - mean * mean;
    const double spread =
        Math::root(temperature * temperature + 0.30396355 * (variance > 0 ? variance : 0.0));  // 3 / pi^2
    move_to(range.origin + mean - spread * logit);
  }

  // Moves tau to a guess, or to the middle of the bracket if the guess lies outside.
  LKV_HD void move_to(double guess) { tau = guess >= low_ && guess <= high_ ? guess : middle(); }

  // Narrows the bracket by the sums at tau, and moves tau unless it is good.
  LKV_HD State step(const SoftSums& sums, const SoftPrecision& precision) {
    const bool upper = k_ > rest_;
    const double excess = upper ? rest_ - sums.rest : sums.m - k_;
    if (excess > 0) {
      low_ = tau;
    } else {
      high_ = tau;
    }
    weight = sums.w;
    if (fabs(excess) <= precision.tolerance * (upper ? rest_ : k_)) return good;
    const double inverse = Math::inverse(sums.w);
    move = excess * inverse;
    const double bent = 1 - 0.5 * move * sums.tilt * inverse;
    if (bent > 0.5 && fabs(move) < 20) move /= bent;
    if (fabs(move) <= precision.resolution) return good;
    double next = tau + temperature_ * move;
    // With few scores, steps may crawl by two temperatures. If two steps have not halved the bracket, tau goes to its
    // middle.
    const bool stalls = ++steps_ % 2 == 0 && fabs(move) > 1 && high_ - low_ > 0.5 * width_;
    if (steps_ % 2 == 0) width_ = high_ - low_;
    const bool inside = next > low_ && next < high_ && !stalls;
    if (!inside) next = middle();
    if (next == tau || !(low_ < high_)) return good;
    tau = next;
    if (!inside || fabs(move) > precision.close) return far;
    weight -= sums.tilt * move;
    return near;
  }

 private:
  // The middle of the bracket. A wide bracket, as when masks have put the largest floats among the scores, is halved by
  // orders of magnitude.
  LKV_HD double middle() const {
    const double linear = 0.5 * (low_ + high_);
    if (high_ - low_ <= 0x1p20 * temperature_) return linear;
    if (low_ < 0 && high_ > 0) return 0;
    const double sign = high_ > 0 ? 1 : -1, far = high_ > 0 ? high_ : -low_, near = high_ > 0 ? low_ : -high_;
    const double tau = sign * Math::root(far) * Math::root(near > temperature_ ? near : temperature_);
    return far > 4 * near && tau > low_ && tau < high_ ? tau : linear;
  }

  double k_, rest_, temperature_, low_, high_, width_;
  int steps_;
};

inline constexpr int kSoftSteps = 96;  // halving twice as often spans any float32 scores

}  // namespace lkv
