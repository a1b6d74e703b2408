#pragma once

#include "host/array.h"
#include "lkv/cpu.h"
#include "lkv/cuda.h"

// Where an op runs: torch's thread pool on the CPU, the current stream of the tensor's device on CUDA.

namespace lkv::torch_ops {

bool runs_cuda(host::Device device);
cpu::Threads torch_threads();

// Makes the device current for its lifetime; holds its current stream.
class CudaScope {
 public:
  explicit CudaScope(host::Device device);
  ~CudaScope();
  CudaScope(const CudaScope&) = delete;
  CudaScope& operator=(const CudaScope&) = delete;

  cuda::Stream stream() const { return stream_; }
  void check(cuda::Status status, const char* kernel) const;

 private:
  void* guard_ = nullptr;
  cuda::Stream stream_ = nullptr;
};

}  // namespace lkv::torch_ops
