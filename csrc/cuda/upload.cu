#include "upload.cuh"

namespace lkv::cuda {
namespace {

constexpr int kBlock = 256;

__global__ void __launch_bounds__(kBlock) upload_kernel(const LKV_GRID_CONSTANT Chunk chunk) {
  write_chunk(chunk);
}

}  // namespace

Status upload_chunk(const Chunk& chunk, Stream stream) {
  return launch(upload_kernel, {.blocks = 1, .block = kBlock}, stream, chunk);
}

Status upload(Upload bytes, Stream stream) {
  Status status = cudaSuccess;
  while (bytes.bytes > 0 && status == cudaSuccess) status = upload_chunk(take_chunk(bytes), stream);
  return status;
}

const char* describe(Status status) {
  if (status == cudaErrorInsufficientDriver) {
    return "the NVIDIA driver is older than the CUDA runtime in this library: update it to the version that "
           "lkv_ext.build_info()['cuda_driver'] names, or build lkv_ext with a toolkit of the driver's version";
  }
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

}  // namespace lkv::cuda
