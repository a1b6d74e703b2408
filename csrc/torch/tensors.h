#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "host/problem.h"

// Tensors of the stable ABI as the arrays that csrc/host checks, and how the ops make new ones.

namespace lkv::torch_ops {

using host::Shape;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Borrows from the tensor; its dtype is the raw number, so any dtype may be moved, known to the headers or not.
host::Array view(const Tensor& t);
std::optional<host::Array> view(const std::optional<Tensor>& t);
host::Arrays view(const Tensors& list);
host::Ints ints(std::optional<std::vector<int64_t>> values, const std::optional<Tensor>& tensor);

// For what an op is about to write: its version counters go up, so that autograd knows of a value that it saved for a
// backward pass and that is gone. Refuses what no op may write in place. `name` is of a list, or of one tensor.
void mark_written(const Tensors& written, const char* name);
void mark_written(const Tensor& written, const host::Name& name);

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// On the device of `like`.
Tensor empty(const Shape& shape, int32_t dtype, const Tensor& like);
// The same, of what may be large and is written at once.
Tensor empty_output(const Shape& shape, int32_t dtype, const Tensor& like);
Tensor empty_int32(const Shape& shape, const Tensor& like);
Tensor empty_bytes(int64_t count, const Tensor& like);

}  // namespace lkv::torch_ops
