#pragma once

#include "lkv/params.h"

// Arguments of the soft_topk kernels. Rows of n scores have up to four leading axes; axes that are missing have size 1.

namespace lkv {

inline constexpr int kLeading = 4;
using Place = int64_t[kLeading];

enum class Number : int32_t { f32, f64, i32, i64 };

// One number per row. Strides are in elements; zero strides broadcast.
struct RowNumbers {
  const void* data;  // nullptr: every row has `fallback`
  Place strides;
  double fallback;
  Number type;

  LKV_HD double at(const Place& place) const {
    if (data == nullptr) return fallback;
    int64_t i = 0;
    for (int axis = 0; axis < kLeading; ++axis) i += place[axis] * strides[axis];
    switch (type) {
      case Number::f32:
        return static_cast<double>(static_cast<const float*>(data)[i]);
      case Number::f64:
        return static_cast<const double*>(data)[i];
      case Number::i32:
        return static_cast<double>(static_cast<const int32_t*>(data)[i]);
      default:
        return static_cast<double>(static_cast<const int64_t*>(data)[i]);
    }
  }
};

// The rows of one call, and the k, temperature and length of each.
struct SoftRows {
  Place sizes;
  int64_t length;  // n
  RowNumbers k, temperature, lengths;
  ScoreType type;  // of the scores
  bool wide;       // all values are float64 (CPU only) and `type` is unused; otherwise the mask is float32
  bool log;        // the mask is stored as its logarithm

  LKV_HD int64_t count() const { return sizes[0] * sizes[1] * sizes[2] * sizes[3]; }
  LKV_HD void find(int64_t row, Place& place) const {
    for (int axis = kLeading; axis-- > 0; row /= sizes[axis]) place[axis] = row % sizes[axis];
  }
  LKV_HD int64_t length_of(const Place& place) const {
    const double n = lengths.at(place);
    return n < 0 ? 0 : n < static_cast<double>(length) ? static_cast<int64_t>(n) : length;
  }
  // Values of device tensors cannot be checked, so they are clamped to [1e-6, 1e30], and NaN becomes 1e-6: the smallest
  // temperature at which scores still differ.
  LKV_HD double temperature_of(const Place& place) const {
    const double t = temperature.at(place);
    return t > 1e-6 ? t < 1e30 ? t : 1e30 : 1e-6;
  }
};

// mask = sigmoid((score - tau) / temperature), with tau such that every row sums to k. Scores of -inf or NaN, and
// positions beyond the length of a row, have mask 0. Rows in which k leaves nothing to decide have weight 0.
struct SoftTopkParams {
  SoftRows rows;
  const char* scores;
  Place strides;  // bytes
  void* mask;     // out [rows, n]
  void* weights;  // out [rows]: the sum of m (1 - m), at least kLeastWeight per score
};

// Gradients of the inputs from that of the mask. Scores are not needed: u = (score - tau) / T follows from the mask.
struct SoftTopkGradParams {
  SoftRows rows;  // k is unused; type is that of grad_scores
  const void *grad, *mask;
  const void* weights;
  void* grad_scores;       // out [rows, n]; nullptr: not wanted
  void* grad_k;            // out [rows]
  void* grad_temperature;  // out [rows]; nullptr: not wanted
};

inline constexpr double kLeastWeight = 1e-6;
inline constexpr double kLogFloor = -1e4;  // logarithm of the mask of a row that keeps nothing

}  // namespace lkv
