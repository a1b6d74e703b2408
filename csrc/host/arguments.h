#pragma once

// The arguments that select, evict, evict_out, evict_ and evict_paged_ share after their tensors, declared once: the
// schemas of the torch ops, the parameters of their C++ functions and the request of the NumPy front end come from this
// table, and Python reads names and defaults from the schema (lkv_ext/_torch/request.py). Their meaning: host::Sizes
// and Layout.
//
// BOTH(type, name, default), and TORCH for those that NumPy does not have: values on a device. Arguments that a plain
// call does not give come last and have a default: each one that is passed costs time to parse, and at decode time the
// call is what an eviction costs.
#define LKV_ARGUMENTS(BOTH, TORCH)             \
  BOTH(Ints, budgets, )                        \
  BOTH(Int, total, )                           \
  BOTH(Int, padded, = -1)                      \
  TORCH(Flag, count_overflow, = False)         \
  BOTH(OptionalArray, cu_seqlens, = None)      \
  BOTH(Int, batch, = 0)                        \
  BOTH(Int, heads, = 0)                        \
  TORCH(OptionalArray, budgets_tensor, = None) \
  BOTH(OptionalInts, lengths, = None)          \
  TORCH(OptionalArray, lengths_tensor, = None) \
  BOTH(OptionalInts, starts, = None)           \
  TORCH(OptionalArray, starts_tensor, = None)  \
  BOTH(Int, sink, = 0)                         \
  BOTH(Int, window, = 0)                       \
  BOTH(Int, max_budget, = -1)                  \
  BOTH(Int, reserve, = 0)                      \
  BOTH(Int, align, = 1)                        \
  BOTH(Int, back, = 0)                         \
  BOTH(Flag, any_order, = False)
