#include "device.h"

#include <torch/csrc/stable/ops.h>

// In place of csrc/torch/device.cpp: every tensor lies on the emulated device, whose memory is that of the host.

namespace lkv::torch_ops {

bool runs_cuda(host::Device) {
  return true;
}

cpu::Threads torch_threads() {
  return {nullptr, nullptr, 1};
}

CudaScope::CudaScope(host::Device) {}

CudaScope::~CudaScope() = default;

void CudaScope::check(cuda::Status status, const char* kernel) const {
  if (status != 0) host::fail("RuntimeError", "the launch of ", kernel, " failed: ", cuda::describe(status));
}

}  // namespace lkv::torch_ops
