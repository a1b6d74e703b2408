#pragma once

#include <utility>

#include "host/arguments.h"
#include "tensors.h"

// The arguments that select, evict, evict_out, evict_ and evict_paged_ share, as the torch ops spell them. Every count
// is a SymInt: torch.compile makes one graph for all values of it, where an int has one for each. A boxed function
// needs its parameters one by one; it gathers them with LKV_GIVEN.

namespace lkv::torch_ops {

using Int = int64_t;
using Flag = bool;
using Ints = std::vector<int64_t>;
using OptionalInts = std::optional<Ints>;
using OptionalArray = std::optional<Tensor>;

#define LKV_SCHEMA_OF_Int "SymInt"
#define LKV_SCHEMA_OF_Flag "bool"
#define LKV_SCHEMA_OF_Ints "SymInt[]"
#define LKV_SCHEMA_OF_OptionalInts "SymInt[]?"
#define LKV_SCHEMA_OF_OptionalArray "Tensor?"

#define LKV_IN_SCHEMA(type, name, fallback) ", " LKV_SCHEMA_OF_##type " " #name #fallback
#define LKV_PARAMETER(type, name, fallback) , type name
#define LKV_FIELD(type, name, fallback) type name;
#define LKV_VALUE(type, name, fallback) std::move(name),

#define LKV_SCHEMA LKV_ARGUMENTS(LKV_IN_SCHEMA, LKV_IN_SCHEMA)
#define LKV_PARAMETERS LKV_ARGUMENTS(LKV_PARAMETER, LKV_PARAMETER)

struct Arguments {
  LKV_ARGUMENTS(LKV_FIELD, LKV_FIELD)

  host::Layout layout(size_t layers) const { return {static_cast<int64_t>(layers), batch, heads, view(cu_seqlens)}; }
  // Takes the integers of the host.
  host::Sizes take_sizes() {
    return {.budgets = ints(std::move(budgets), budgets_tensor),
            .lengths = ints(std::move(lengths), lengths_tensor),
            .starts = ints(std::move(starts), starts_tensor),
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
#define LKV_GIVEN                       \
  Arguments {                           \
    LKV_ARGUMENTS(LKV_VALUE, LKV_VALUE) \
  }

}  // namespace lkv::torch_ops
