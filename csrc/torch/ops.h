#pragma once

#include <tuple>

#include "arguments.h"

// The ops of the library, one file each; library.cpp gives them their schemas.

namespace lkv::torch_ops {

// positions, lengths, cu_seqlens, overflow
using IndexTuple = std::tuple<Tensor, Tensor, Tensor, Tensor>;
// payload, positions, lengths, cu_seqlens, overflow
using EvictTuple = std::tuple<Tensors, Tensor, Tensor, Tensor, Tensor>;

IndexTuple select(Tensors scores, LKV_SIZE_PARAMETERS);
EvictTuple evict(Tensors payload, Tensors scores, LKV_SIZE_PARAMETERS);
void evict_out(Tensors out, Tensor positions, Tensor kept, Tensor offsets, std::optional<Tensor> overflow,
               Tensors payload, Tensors scores, LKV_SIZE_PARAMETERS);
IndexTuple evict_(Tensors payload, Tensors scores, LKV_SIZE_PARAMETERS);
Tensors gather(Tensors tensors, int64_t layers, int64_t batch, int64_t heads, std::optional<Tensor> source_cu_seqlens,
               Tensor positions, Tensor cu_seqlens);

// Outputs of an op, allocated on the device of its tensors.
Index new_index(const host::Problem& problem, const host::Sizes& sizes, const Tensor& like, bool count_overflow);
Tensors new_outputs(const host::Problem& problem, const Tensors& payload, int64_t total, int64_t padded);

}  // namespace lkv::torch_ops
