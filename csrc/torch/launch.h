#pragma once

#include "device.h"
#include "host/params.h"
#include "tensors.h"

// Runs the kernels of one op call where its tensors live.

namespace lkv::torch_ops {

// `index`: positions, lengths, cu_seqlens and, where it is counted, overflow.
host::IndexPointers pointers(const Tensor* index, bool count_overflow);

class Launch {
 public:
  // `outputs`: where the payload goes, one contiguous tensor each; nullptr for ops that move nothing or move in place.
  // `like`: any tensor on the device of the call.
  Launch(host::Problem& problem, const Tensor* outputs, const Tensor& like, bool selects);

  // Spans, then the positions of the kept rows.
  void select(const host::Sizes& sizes, const host::IndexPointers& out);
  // The same, and the rows move as soon as their positions are known. `warm`: see GatherParams.
  void evict(const host::Sizes& sizes, const host::IndexPointers& out, bool warm);
  void gather(const int32_t* positions, const int32_t* cu_seqlens, int64_t total);
  // `index`: what select wrote. `filled`: see CompactParams.
  void compact(const host::Sizes& sizes, const host::IndexPointers& index, int32_t* filled);
  AppendParams append_params(const host::IntTable& valid) const;
  void append(const AppendParams& append);

 private:
  cuda::Upload upload() const;  // of the tables
  void make_spans(const SpansParams& spans);

  const host::Problem& problem_;
  size_t outputs_;
  const char* tables_;  // where the kernels read them
  std::optional<CudaScope> cuda_;
  std::optional<Tensor> memory_;  // device memory: the tables, the ready flags, the scratch of select
  std::optional<Tensor> flags_;   // the scratch of compact
  const Tensor& like_;
  uint32_t* ready_ = nullptr;
  void* scratch_ = nullptr;
};

}  // namespace lkv::torch_ops
