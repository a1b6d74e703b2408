#pragma once

#include <optional>

#include "arrays.h"
#include "host/problem.h"

// The ops on arrays, as those of csrc/torch on tensors: checks, then the kernels without the GIL.

namespace lkv::python {

// What lkv_ext.numpy made of the arguments that the ops share; see host::Sizes.
struct Request {
  int64_t batch, heads;
  std::optional<py::array> cu_seqlens;  // of ragged input, else batch and heads are read from the arrays
  std::vector<int64_t> budgets, lengths, starts;
  int64_t sink, window, total, padded, max_budget, reserve, align, threads;

  host::Layout layout() const {
    return {1, batch, heads, cu_seqlens ? std::optional(view(*cu_seqlens)) : std::nullopt};
  }
  host::Sizes sizes() const {
    return {{budgets, {}}, {lengths, {}}, {starts, {}}, sink, window, total, padded, max_budget, reserve, align};
  }
};

struct Index {
  py::array positions, lengths, cu_seqlens;
};

Index select(const py::array& scores, const Request& request);
PyArrays gather(const PyArrays& arrays, const Index& index, const Request& request);
std::pair<PyArrays, Index> evict(const PyArrays& payload, const py::array& scores, const Request& request);
void evict_out(const PyArrays& out, const Index& index, const PyArrays& payload, const py::array& scores,
               const Request& request);
Index evict_in_place(const PyArrays& payload, const py::array& scores, const Request& request);

}  // namespace lkv::python
