#pragma once

#include "launch.h"

// The trailing arguments that select, evict, evict_out and evict_ have in common, in the order of the schema. A boxed
// function must spell its parameters out, so they are written once here.

#define LKV_SIZE_SCHEMA                                                                                      \
  "SymInt batch, SymInt heads, Tensor? cu_seqlens, SymInt[] budgets, Tensor? budgets_tensor, "               \
  "SymInt[] lengths, Tensor? lengths_tensor, SymInt[] starts, Tensor? starts_tensor, SymInt sink, "          \
  "SymInt window, SymInt total, SymInt padded, SymInt max_budget, SymInt reserve, SymInt align, "            \
  "bool count_overflow"

#define LKV_SIZE_PARAMETERS                                                                                  \
  int64_t batch, int64_t heads, std::optional<Tensor> cu_seqlens, std::vector<int64_t> budgets,              \
      std::optional<Tensor> budgets_tensor, std::vector<int64_t> lengths, std::optional<Tensor> lengths_tensor, \
      std::vector<int64_t> starts, std::optional<Tensor> starts_tensor, int64_t sink, int64_t window,        \
      int64_t total, int64_t padded, int64_t max_budget, int64_t reserve, int64_t align, bool count_overflow

#define LKV_LAYOUT(layers) Layout{layers, batch, heads, cu_seqlens}

#define LKV_SIZES                                                                                            \
  Sizes{{std::move(budgets), budgets_tensor}, {std::move(lengths), lengths_tensor}, {std::move(starts), starts_tensor}, \
        sink, window, total, padded, max_budget, reserve, align}
