#pragma once

#include <tuple>

#include "arguments.h"
#include "launch.h"

// The ops of the library, one file each; library.cpp gives them their schemas.

namespace lkv::torch_ops {

// An index as ops return it: positions, lengths, cu_seqlens and, where it is counted, overflow.
Tensors select(Tensors scores LKV_PARAMETERS);
// The moved payload, then the index.
Tensors evict(Tensors payload, Tensors scores LKV_PARAMETERS);
// k, v, positions, lengths, cu_seqlens.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> evict_plain(Tensor k, Tensor v, Tensor scores,
                                                               std::vector<int64_t> budgets, int64_t total);
void evict_out(Tensors out, Tensors payload, Tensors scores LKV_PARAMETERS);
// An index; overflow has no element where it is not counted.
std::tuple<Tensor, Tensor, Tensor, Tensor> evict_(Tensors payload, Tensors scores LKV_PARAMETERS);
// The same in pools [P, H, page, ...] of pages, or, of one head each, [P, page, ...], payload-major, through tables
// [B, M] or [B, H, M], one for all or more for the last kinds of pools; and the free pages of all tables, flat.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> evict_paged_(Tensors pools, Tensors scores,
                                                                Tensors tables LKV_PARAMETERS);
Tensors gather(Tensors tensors, Tensor positions, Tensor cu_seqlens, int64_t layers,
               std::optional<Tensor> source_cu_seqlens, int64_t batch, int64_t heads);

// New rows [B, H, n, ...] at the end of every segment of a ragged cache.
void append_(Tensors cache, Tensor positions, Tensor lengths, Tensor cu_seqlens, Tensors rows, int64_t position,
             std::optional<std::vector<int64_t>> valid, std::optional<Tensor> valid_tensor);
// q [B, Hq, n, D] over a ragged cache: [B, n, Hq, Dv].
Tensor attend(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor lengths, int64_t longest, bool causal,
              double scale, double softcap, std::optional<Tensor> sinks);
// The same through tables [B, H, M] over pools [P, page, D] of pages of one head each, on the CPU alone.
Tensor attend_paged(Tensor q, Tensor k, Tensor v, Tensor tables, Tensor lengths, int64_t longest, bool causal,
                    double scale, double softcap, std::optional<Tensor> sinks);
// The mask [..., n], or its logarithm, and the weight of every row, which its gradient needs.
std::tuple<Tensor, Tensor> soft_topk(Tensor scores, std::optional<Tensor> k, double k_value,
                                     std::optional<Tensor> temperature, double temperature_value,
                                     std::optional<Tensor> lengths, bool log);
// Gradients of scores [..., n], k [...] and temperature [...]; without elements where they are not wanted.
std::tuple<Tensor, Tensor, Tensor> soft_topk_backward(Tensor grad, Tensor mask, Tensor weights,
                                                      std::optional<Tensor> temperature, double temperature_value,
                                                      std::optional<Tensor> lengths, int64_t element, bool log,
                                                      bool to_scores, bool to_temperature);

// Outputs of an op, allocated on the device of its tensors and added to `list`.
void add_index(Tensors& list, const host::Problem& problem, const host::Sizes& sizes, const Tensor& like,
               bool count_overflow);
void add_outputs(Tensors& list, const host::Problem& problem, const Tensors& payload, int64_t total, int64_t padded);

}  // namespace lkv::torch_ops
