#include "device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

// Weak: a CPU-only libtorch does not define these, and the same library must load there.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
}

namespace lkv::torch_ops {

bool runs_cuda(host::Device device) {
  return device.kind == host::Device::cuda;
}

cpu::Threads torch_threads() {
  const auto run = [](void*, int64_t n, int64_t grain, cpu::Threads::Body body, void* context) {
    torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return {run, nullptr, static_cast<int64_t>(torch::stable::get_num_threads())};
}

CudaScope::CudaScope(host::Device device) {
  // Without the current stream the op would race with the caller: refuse, never fall back to the default stream.
  if (aoti_torch_get_current_cuda_stream == nullptr)
    host::fail("RuntimeError", "this libtorch has no CUDA: its current stream is unknown");
  void* stream = nullptr;
  DeviceGuardHandle guard = nullptr;
  if (aoti_torch_get_current_cuda_stream(device.index, &stream) != 0 ||
      aoti_torch_create_device_guard(device.index, &guard) != 0)
    host::fail("RuntimeError", "cannot use ", describe(device));
  guard_ = guard;
  stream_ = static_cast<cuda::Stream>(stream);
}

CudaScope::~CudaScope() {
  aoti_torch_delete_device_guard(static_cast<DeviceGuardHandle>(guard_));
}

void CudaScope::check(cuda::Status status, const char* kernel) const {
  if (status != 0) host::fail("RuntimeError", "the CUDA launch of ", kernel, " failed: ", cuda::describe(status));
}

}  // namespace lkv::torch_ops
