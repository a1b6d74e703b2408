#pragma once

#include <optional>

#include "arrays.h"
#include "host/arguments.h"
#include "host/problem.h"

// The ops on arrays, as those of csrc/torch on tensors: checks, then the kernels without the GIL.

namespace lkv::python {

using Int = int64_t;
using Flag = bool;
using Ints = std::vector<int64_t>;
using OptionalInts = std::optional<Ints>;
using OptionalArray = std::optional<py::array>;

#define LKV_FIELD(type, name, fallback) type name;
#define LKV_NOTHING(type, name, fallback)

// What lkv_ext.numpy made of the arguments that the ops share.
struct Request {
  int64_t threads;
  LKV_ARGUMENTS(LKV_FIELD, LKV_NOTHING)

  host::Layout layout() const {
    return {1, batch, heads, cu_seqlens ? std::optional(view(*cu_seqlens)) : std::nullopt};
  }
  host::Sizes sizes() const {
    return {.budgets = {budgets, {}},
            .lengths = {lengths.value_or(Ints()), {}},
            .starts = {starts.value_or(Ints()), {}},
            .sink = sink,
            .window = window,
            .total = total,
            .padded = padded,
            .max_budget = max_budget,
            .reserve = reserve,
            .align = align,
            .back = back,
            .any_order = any_order};
  }
};

struct Index {
  py::array positions, lengths, cu_seqlens;
};

Index select(const py::array& scores, const Request& request);
// batch, heads and cu_seqlens: as in the table.
PyArrays gather(const PyArrays& arrays, const Index& index, int64_t batch, int64_t heads,
                const OptionalArray& cu_seqlens, int64_t threads);
std::pair<PyArrays, Index> evict(const PyArrays& payload, const py::array& scores, const Request& request);
void evict_out(const PyArrays& out, const Index& index, const PyArrays& payload, const py::array& scores,
               const Request& request);
Index evict_in_place(const PyArrays& payload, const py::array& scores, const Request& request);
// Pools through tables; and the free pages of each table, one table after the other.
std::pair<Index, py::array> evict_paged(const PyArrays& pools, const py::array& scores, const PyArrays& tables,
                                        const Request& request);

}  // namespace lkv::python
