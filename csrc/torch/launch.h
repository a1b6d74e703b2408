#pragma once

#include "device.h"
#include "problem.h"

// Runs the kernels of one op call where its tensors live.

namespace lkv::torch_ops {

// What select and evict return beside the moved rows.
struct Index {
  Tensor positions, lengths, cu_seqlens, overflow;  // overflow has no element unless it is counted
};

class Launch {
 public:
  // `outputs`: where the payload goes, contiguous; empty for ops that move nothing or move in place.
  Launch(Problem& problem, const Tensors& outputs, bool selects);

  // Rooms, then the positions of the kept rows. With `gathers`, a gather follows at once and may start early.
  void select(const Sizes& sizes, const Index& out, bool gathers);
  void gather(const Tensor& positions, const Tensor& cu_seqlens, bool behind_select, bool warm);
  void compact(const Index& index);

 private:
  template <class T>
  T* table(size_t offset) const {
    return reinterpret_cast<T*>(const_cast<char*>(tables_) + offset);
  }
  Source source() const;

  const Problem& problem_;
  size_t outputs_;
  const char* tables_;
  std::optional<CudaScope> cuda_;
  std::optional<Tensor> memory_;  // device memory: the tables, the ready flags, the scratch of select
  uint32_t* ready_ = nullptr;
  void* scratch_ = nullptr;
};

}  // namespace lkv::torch_ops
