#pragma once

#include <cmath>
#include <cstdint>

#include "lkv/keys.h"

// The search for tau, from sums over the row that the kernels make: Halley's steps in a bracket. The same on CPU and
// GPU, in double.

namespace lkv {

// The finite scores of a row; moments are about `origin`. Scores of +inf are counted apart, all others are missing.
struct SoftRange {
  double lowest, highest, sum, squares, origin;
  int64_t finite, infinite;
};

// Over a row at some tau, with w = m (1 - m).
struct SoftSums {
  double m, rest;  // of m, and of 1 - m
  double w, tilt;  // of w, and of w (1 - 2 m)
  bool finite;     // all scores are; set on the CPU alone
};

// Math: inverse, log and root of double. The device has its own, as a division there is a call.
struct HostMath {
  static double inverse(double x) { return 1 / x; }
  static double log(double x) { return std::log(x); }
  static double root(double x) { return std::sqrt(x); }
};

// How exact a threshold must be. tolerance: of the sum, relative to k or to what is left of the row; resolution: the
// least step, and close: one from which Halley's next lands within rounding, as its error is cubic; both in units of
// the temperature.
struct SoftPrecision {
  double tolerance, resolution, close;
};

LKV_HD SoftPrecision soft_precision(bool wide) {
  return wide ? SoftPrecision{1e-14, 0x1p-50, 1e-5} : SoftPrecision{1e-6, 0x1p-22, 1e-2};
}

template <class Math = HostMath>
class SoftThreshold {
 public:
  // The state of tau after a step. near: it has moved by `move` temperatures and needs no further step.
  enum State { far, near, good };

  double tau, move, weight;  // weight: the sum of w at tau, as soon as it is near

  // Whether the row has a tau: without one, its finite scores are all kept or all left out.
  LKV_HD static bool decided(const SoftRange& range, double k) {
    const double kept = k - static_cast<double>(range.infinite);
    return !(kept > 0 && kept < static_cast<double>(range.finite));
  }

  // `count`: the scores that are summed over, missing ones included; these have m = 0.
  LKV_HD void start(const SoftRange& range, int64_t count, double k, double temperature) {
    k_ = k;
    rest_ = static_cast<double>(count) - k;
    temperature_ = temperature;
    const double n = static_cast<double>(range.finite), kept = k - static_cast<double>(range.infinite);
    const double logit = Math::log(kept * Math::inverse(n - kept)), each = Math::inverse(n);
    // At these all masks would be at least, or at most, the mean.
    low_ = range.lowest - temperature * logit;
    high_ = range.highest - temperature * logit;
    width_ = high_ - low_;
    steps_ = 0;
    // Scores and the noise that the temperature adds, as one logistic distribution.
    const double mean = range.sum * each, variance = range.squares * each - mean * mean;
    const double spread =
        Math::root(temperature * temperature + 0.30396355 * (variance > 0 ? variance : 0.0));  // 3 / pi^2
    move_to(range.origin + mean - spread * logit);
  }

  // Moves tau elsewhere within the bracket.
  LKV_HD void move_to(double guess) { tau = guess >= low_ && guess <= high_ ? guess : middle(); }

  // Takes the sums at tau, and moves it unless it is good.
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
    // Where there are few scores, steps may crawl by two temperatures: every other one halves the bracket, or it is
    // halved.
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
  // The middle of the bracket; by orders of magnitude where it is wide, as it is when masks have put the largest floats
  // among the scores.
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
