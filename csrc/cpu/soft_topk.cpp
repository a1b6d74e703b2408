#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "lkv/floats.h"
#include "row_kernels.h"
#include "units.h"

// soft_topk on the CPU. A row is a unit of work and stays in the cache of its thread.
//   1. A long row is sampled in blocks, and the tau of the sample found: a guess for the tau of the row.
//   2. One rough pass over the row moves the guess; up to four passes with exact sums follow until tau is near. If that
//      is not enough, or some score is not finite, the row goes through step 3.
//   3. Other rows start with a pass that finds count, range, mean and variance of the finite scores. Where k leaves no
//      choice all of them are kept, or none; otherwise these numbers give the first tau, and passes as in 2 follow.
//   4. A pass near tau already writes the mask; if tau then moves a little more, the mask is corrected to second order.
// How tau moves is in lkv/soft_threshold.h. The gradient is two passes: sums, then the gradient of each score.

namespace lkv::cpu {
namespace {

// Scores below which another thread is not worth waking.
constexpr int64_t kGrain = 8 << 10;

// The sample of a long row: blocks of scores from all over it.
constexpr int64_t kSampleBlock = 16;
constexpr int64_t kLongRow = 2048;

constexpr int64_t kLargestSample = 4096;

int64_t sample_size(int64_t n) {
  return n < kLongRow ? 0 : std::clamp<int64_t>(n / 32, 256, kLargestSample) / kSampleBlock * kSampleBlock;
}

const SoftKernels& kernels_of(const SoftRows& rows) {
  return rows.wide ? soft_double_kernels : row_kernels().soft[static_cast<int>(rows.type)];
}

int64_t score_bytes(const SoftRows& rows) {
  return rows.wide ? 8 : rows.type == ScoreType::f32 ? 4 : 2;
}

class SoftTopk {
 public:
  explicit SoftTopk(const SoftTopkParams& p)
      : p_(p), kernels_(kernels_of(p.rows)), precision_(soft_precision(p.rows.wide)), item_(score_bytes(p.rows)) {}

  template <class Real>
  void run(int64_t row) const {
    Place place;
    p_.rows.find(row, place);
    const char* scores = p_.scores;
    for (int axis = 0; axis < kLeading; ++axis) scores += place[axis] * p_.strides[axis];
    const int64_t n = p_.rows.length_of(place);
    const double k = p_.rows.k.at(place), temperature = p_.rows.temperature_of(place);
    Real* mask = static_cast<Real*>(p_.mask) + row * p_.rows.length;
    double weight = 0;
    if (!quick(scores, n, k, temperature, mask, weight)) {
      const SoftRange range = kernels_.range(scores, n);
      if (SoftThreshold<>::decided(range, k)) {
        decide(scores, n, k > static_cast<double>(range.infinite), mask);
      } else {
        SoftThreshold<> threshold;
        threshold.start(range, n, k, temperature);
        const bool close = range.finite == n && approach(threshold, scores, n, temperature);
        if (!find(threshold, scores, n, temperature, mask, close, kSoftSteps)) {
          kernels_.pass({scores, n, threshold.tau, temperature, mask, p_.rows.log});
        }
        weight = std::max(threshold.weight, kLeastWeight * static_cast<double>(range.finite));
      }
    }
    const double missing = p_.rows.log ? -std::numeric_limits<double>::infinity() : 0;
    std::fill(mask + n, mask + p_.rows.length, static_cast<Real>(missing));
    static_cast<Real*>(p_.weights)[row] = static_cast<Real>(weight);
  }

 private:
  // The mask of a long row whose scores are all finite, from the tau of a sample and without a pass for its range.
  bool quick(const char* scores, int64_t n, double k, double temperature, void* mask, double& weight) const {
    const int64_t size = sample_size(n);
    SoftThreshold<> threshold;
    if (size == 0 || p_.rows.wide || !(k > 0 && k < static_cast<double>(n))) return false;
    if (!guess(threshold, scores, n, size, k, temperature)) return false;
    const double tau = threshold.tau;
    threshold.start({-1e30, 1e30, 0, 0, 0, n, 0}, n, k, temperature);
    threshold.move_to(tau);
    if (!approach(threshold, scores, n, temperature) || !find(threshold, scores, n, temperature, mask, true, 4)) {
      return false;
    }
    weight = std::max(threshold.weight, kLeastWeight * static_cast<double>(n));
    return true;
  }

  // Moves the threshold until it is exact enough, and writes the mask. False if that takes more steps. `close`: it is
  // near already.
  bool find(SoftThreshold<>& threshold, const char* scores, int64_t n, double temperature, void* mask, bool close,
            int steps) const {
    for (int i = 0; i < steps; ++i) {
      // Near tau a small correction of the mask is enough, so it is written at once; a logarithm costs more.
      void* out = (close || i > 0) && !p_.rows.log ? mask : nullptr;
      const auto state = threshold.step(kernels_.pass({scores, n, threshold.tau, temperature, out, false}), precision_);
      if (state == SoftThreshold<>::far) continue;
      if (out == nullptr) {
        kernels_.pass({scores, n, threshold.tau, temperature, mask, p_.rows.log});
      } else if (state == SoftThreshold<>::near) {
        kernels_.nudge(mask, n, threshold.move);
      }
      return true;
    }
    return false;
  }

  // One step by rough sums, of which only tau is kept, as the bracket must hold. False where scores are not finite.
  bool approach(SoftThreshold<>& threshold, const char* scores, int64_t n, double temperature) const {
    const SoftSums sums = kernels_.pass({scores, n, threshold.tau, temperature, nullptr, false, true});
    if (!sums.finite) return false;
    SoftThreshold<> probe = threshold;
    probe.step(sums, precision_);
    threshold.move_to(probe.tau);
    return true;
  }

  // The threshold of a sample of the row; false where its scores are not all finite.
  bool guess(SoftThreshold<>& threshold, const char* scores, int64_t n, int64_t size, double k,
             double temperature) const {
    alignas(64) char sample[kLargestSample * sizeof(float)];
    const int64_t blocks = size / kSampleBlock, bytes = kSampleBlock * item_;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t from = i * (n - kSampleBlock) / (blocks - 1);
      std::memcpy(sample + i * bytes, scores + from * item_, static_cast<size_t>(bytes));
    }
    const SoftRange range = kernels_.range(sample, size);
    if (range.finite != size) return false;
    threshold.start(range, size, k * static_cast<double>(size) / static_cast<double>(n), temperature);
    for (int i = 0; i < kSoftSteps; ++i) {
      const SoftSums sums = kernels_.pass({sample, size, threshold.tau, temperature, nullptr, false, true});
      if (threshold.step(sums, {0.02, precision_.resolution, 0.1}) != SoftThreshold<>::far) break;
    }
    return true;
  }

  // All finite scores are kept, or none.
  template <class Real>
  void decide(const char* scores, int64_t n, bool kept, Real* mask) const {
    const bool log = p_.rows.log;
    const auto keep = static_cast<Real>(log ? 0 : 1), leave = static_cast<Real>(log ? kLogFloor : 0);
    const auto missing = static_cast<Real>(log ? -std::numeric_limits<double>::infinity() : 0);
    for (int64_t i = 0; i < n; ++i) {
      const double score = value(scores + i * item_);
      const bool infinite = score > std::numeric_limits<double>::max();
      mask[i] = infinite || kept ? keep : leave;
      if (!(score >= -std::numeric_limits<double>::max())) mask[i] = missing;
    }
  }

  double value(const char* item) const {
    if (p_.rows.wide) return read<double>(item);
    switch (p_.rows.type) {
      case ScoreType::f32:
        return read<float>(item);
      case ScoreType::f16:
        return to_float<ScoreType::f16>(read<uint16_t>(item));
      default:
        return to_float<ScoreType::bf16>(read<uint16_t>(item));
    }
  }

  template <class T>
  static T read(const char* item) {
    T x;
    std::memcpy(&x, item, sizeof(x));
    return x;
  }

  const SoftTopkParams& p_;
  const SoftKernels& kernels_;
  SoftPrecision precision_;
  int64_t item_;
};

template <class Real>
void run_grad(const SoftTopkGradParams& p, int64_t row) {
  const SoftKernels& kernels = kernels_of(p.rows);
  Place place;
  p.rows.find(row, place);
  const int64_t length = p.rows.length, first = row * length, item = score_bytes(p.rows);
  const double weight = static_cast<double>(static_cast<const Real*>(p.weights)[row]);
  const int64_t n = weight > 0 ? p.rows.length_of(place) : 0;
  char* out = static_cast<char*>(p.grad_scores);
  SoftGrad grad = {static_cast<const Real*>(p.mask) + first,
                   static_cast<const Real*>(p.grad) + first,
                   n,
                   p.rows.log,
                   0,
                   p.rows.temperature_of(place),
                   out == nullptr ? nullptr : out + first * item};
  const SoftGradSums sums = kernels.sum_grad(grad, p.grad_temperature != nullptr);
  grad.mean = n > 0 ? sums.a / weight : 0;
  static_cast<Real*>(p.grad_k)[row] = static_cast<Real>(grad.mean);
  if (p.grad_temperature != nullptr) {
    const double slope = n > 0 ? (sums.wu * grad.mean - sums.au) / grad.temperature : 0;
    static_cast<Real*>(p.grad_temperature)[row] = static_cast<Real>(slope);
  }
  if (out == nullptr) return;
  kernels.write_grad(grad);
  std::memset(out + (first + n) * item, 0, static_cast<size_t>((length - n) * item));
}

template <class F>
void for_each_row(const SoftRows& rows, const Threads& threads, F&& f) {
  const int64_t count = rows.count();
  const int64_t workers = useful_workers(threads, count, count * rows.length, kGrain);
  for_each_unit(threads, workers, count, [&](int64_t row, int64_t) { f(row); });
}

}  // namespace

void soft_topk(const SoftTopkParams& p, const Threads& threads) {
  const SoftTopk op(p);
  for_each_row(p.rows, threads, [&](int64_t row) { p.rows.wide ? op.run<double>(row) : op.run<float>(row); });
}

void soft_topk_grad(const SoftTopkGradParams& p, const Threads& threads) {
  for_each_row(p.rows, threads, [&](int64_t row) { p.rows.wide ? run_grad<double>(p, row) : run_grad<float>(p, row); });
}

}  // namespace lkv::cpu
