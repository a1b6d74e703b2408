#pragma once

#include "launch.h"

// The trailing arguments that select, evict, evict_out and evict_ have in common, in the order of the schema. A boxed
// function must spell its parameters out, so they are written once here.

// What a plain call does not give comes last and has a default: every argument that is passed costs time to parse, and
// at decode time the call is what an eviction costs. Every count is a SymInt: torch.compile makes one graph for all
// values of it, where an int has one for each.
#define LKV_SIZE_SCHEMA                                                                                    \
  "SymInt[] budgets, SymInt total, SymInt padded=-1, bool count_overflow=False, Tensor? cu_seqlens=None, " \
  "SymInt batch=0, SymInt heads=0, Tensor? budgets_tensor=None, SymInt[]? lengths=None, "                  \
  "Tensor? lengths_tensor=None, SymInt[]? starts=None, Tensor? starts_tensor=None, SymInt sink=0, "        \
  "SymInt window=0, SymInt max_budget=-1, SymInt reserve=0, SymInt align=1"

#define LKV_SIZE_PARAMETERS                                                                                            \
  std::vector<int64_t> budgets, int64_t total, int64_t padded, bool count_overflow, std::optional<Tensor> cu_seqlens,  \
      int64_t batch, int64_t heads, std::optional<Tensor> budgets_tensor, std::optional<std::vector<int64_t>> lengths, \
      std::optional<Tensor> lengths_tensor, std::optional<std::vector<int64_t>> starts,                                \
      std::optional<Tensor> starts_tensor, int64_t sink, int64_t window, int64_t max_budget, int64_t reserve,          \
      int64_t align

#define LKV_LAYOUT(layers)                 \
  host::Layout {                           \
    layers, batch, heads, view(cu_seqlens) \
  }

#define LKV_SIZES                                                                                       \
  host::Sizes {                                                                                         \
    ints(std::move(budgets), budgets_tensor), ints(std::move(lengths), lengths_tensor),                 \
        ints(std::move(starts), starts_tensor), sink, window, total, padded, max_budget, reserve, align \
  }
