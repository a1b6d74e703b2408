#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "checks.h"
#include "lkv/params.h"

// What the ops ask of a tensor, and how they make one. Nothing here is specific to an op.

namespace lkv::torch_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

struct DeviceId {
  int32_t type, index;
  bool operator==(const DeviceId&) const = default;
};

DeviceId device_of(const Tensor& t);
std::string describe(DeviceId device);
int32_t dtype_of(const Tensor& t);  // the raw dtype number: any dtype may be moved, known to the headers or not
Shape shape_of(const Tensor& t);

Tensor empty(const Shape& shape, int32_t dtype, DeviceId device);
Tensor empty_int32(const Shape& shape, DeviceId device);

// A tensor named in error messages: "scores[3]".
struct Named {
  const Tensor& tensor;
  std::string name;
};

void check_device(const Named& t, DeviceId expected);
void check_int32(const Named& t, const Shape& expected, const char* dims);
ScoreType check_scores_dtype(const Named& scores);

// Rows of a tensor [B, H, L, ...] or, ragged, [T, ...]: everything after the token axis is one row and contiguous.
struct RowLayout {
  Strided strided;
  int64_t row_bytes;
  Shape trailing;  // the sizes after the token axis
};

RowLayout row_layout(const Named& t, bool ragged);

// A tensor of integers read once per row set, broadcast (right-aligned) to [layers, batch, heads].
RowInts row_ints(const Named& t, int64_t layers, int64_t batch, int64_t heads);

// First and one-past-last byte that a tensor touches.
struct Extent {
  const char *begin, *end;
};
Extent extent_of(const Tensor& t);

}  // namespace lkv::torch_ops
