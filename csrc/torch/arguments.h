#pragma once

#include "launch.h"

// The trailing arguments that select, evict, evict_out and evict_ have in common, in the order of the schema. A boxed
// function must spell its parameters out, so they are written once here.

// Only what may change from call to call under torch.compile is symbolic: parsing a SymInt costs more than an int.
#define LKV_SIZE_SCHEMA                                                                                        \
  "int batch, int heads, Tensor? cu_seqlens, SymInt[] budgets, Tensor? budgets_tensor, SymInt[]? lengths, "    \
  "Tensor? lengths_tensor, SymInt[]? starts, Tensor? starts_tensor, int sink, int window, SymInt total, "      \
  "SymInt padded, int max_budget, int reserve, int align, bool count_overflow"

#define LKV_SIZE_PARAMETERS                                                                                    \
  int64_t batch, int64_t heads, std::optional<Tensor> cu_seqlens, std::vector<int64_t> budgets,                \
      std::optional<Tensor> budgets_tensor, std::optional<std::vector<int64_t>> lengths,                       \
      std::optional<Tensor> lengths_tensor, std::optional<std::vector<int64_t>> starts,                        \
      std::optional<Tensor> starts_tensor, int64_t sink, int64_t window, int64_t total, int64_t padded,        \
      int64_t max_budget, int64_t reserve, int64_t align, bool count_overflow

#define LKV_LAYOUT(layers) host::Layout{layers, batch, heads, view(cu_seqlens)}

#define LKV_SIZES                                                                                              \
  host::Sizes{ints(std::move(budgets), budgets_tensor), ints(std::move(lengths), lengths_tensor),              \
              ints(std::move(starts), starts_tensor), sink, window, total, padded, max_budget, reserve, align}
