#pragma once

#include "device.h"
#include "host/params.h"
#include "tensors.h"

// Runs the kernels of one op call where its tensors live.

namespace lkv::torch_ops {

// What select and evict return beside the moved rows.
struct Index {
  Tensor positions, lengths, cu_seqlens, overflow;  // overflow has no element unless it is counted
};

class Launch {
 public:
  // `outputs`: where the payload goes, contiguous; empty for ops that move nothing or move in place.
  // `like`: any tensor on the device of the call.
  Launch(host::Problem& problem, const Tensors& outputs, const Tensor& like, bool selects);

  // Rooms, then the positions of the kept rows. With `gathers`, a gather follows at once and may start early.
  void select(const host::Sizes& sizes, const Index& out, bool gathers);
  void gather(const Tensor& positions, const Tensor& cu_seqlens, bool behind_select, bool warm);
  void compact(const Index& index);

 private:
  const host::Problem& problem_;
  size_t outputs_;
  const char* tables_;  // where the kernels read them
  std::optional<CudaScope> cuda_;
  std::optional<Tensor> memory_;  // device memory: the tables, the ready flags, the scratch of select
  uint32_t* ready_ = nullptr;
  void* scratch_ = nullptr;
};

}  // namespace lkv::torch_ops
