#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "lkv/cuda.h"

namespace lkv::cuda {

struct Grid {
  int64_t blocks;  // a multiple of `cluster`
  int block = 0;
  size_t shared = 0;       // dynamic shared memory per block
  int cluster = 1;         // blocks per cluster; more than one needs sm_90
  bool dependent = false;  // may start before the grid in front of it is complete (programmatic dependent launch)
};

inline constexpr int64_t kMaxBlocks = INT32_MAX;
inline constexpr size_t kDefaultShared = 48 << 10;  // more than this must be allowed per kernel
inline constexpr int kPortableCluster = 8;          // more than this must be allowed per kernel

// A launch config and the attributes it points to.
struct LaunchConfig {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};

  LaunchConfig(const Grid& g, Stream stream) {
    config.gridDim = dim3(static_cast<unsigned>(g.blocks));
    config.blockDim = dim3(static_cast<unsigned>(g.block));
    config.dynamicSmemBytes = g.shared;
    config.stream = stream;
    config.attrs = attributes;
    if (g.cluster > 1) {
      cudaLaunchAttribute& a = attributes[config.numAttrs++];
      a.id = cudaLaunchAttributeClusterDimension;
      a.val.clusterDim.x = static_cast<unsigned>(g.cluster);
      a.val.clusterDim.y = a.val.clusterDim.z = 1;
    }
    if (g.dependent) {
      cudaLaunchAttribute& a = attributes[config.numAttrs++];
      a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      a.val.programmaticStreamSerializationAllowed = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;
};

template <class... Params>
Status launch(void (*kernel)(Params...), const Grid& grid, Stream stream, const Params&... args) {
  if (grid.blocks <= 0) return cudaSuccess;
  const LaunchConfig launch(grid, stream);
  return cudaLaunchKernelEx(&launch.config, kernel, args...);
}

// f of a score type known at compile time.
template <class F>
Status with_type(ScoreType type, F&& f) {
  switch (type) {
    case ScoreType::f32:
      return f.template operator()<ScoreType::f32>();
    case ScoreType::f16:
      return f.template operator()<ScoreType::f16>();
    case ScoreType::bf16:
      return f.template operator()<ScoreType::bf16>();
  }
  return cudaErrorInvalidValue;
}

// The current device, as far as launches depend on it.
struct Device {
  int multiprocessors = 0;
  int shared_per_block = 0;  // with the opt-in
  bool clusters = false;     // clusters and dependent launches

  static Status current(Device& out) {
    int device = 0, major = 0;
    Status status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (status == cudaSuccess) {
      status = cudaDeviceGetAttribute(&out.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    }
    if (status == cudaSuccess) {
      status = cudaDeviceGetAttribute(&out.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    out.clusters = major >= 9;
    return status;
  }
};

// Lets a kernel have the shared memory and the cluster that a grid asks for.
template <class Kernel>
Status allow(Kernel* kernel, const Grid& grid, const Device& device) {
  cudaError_t status = cudaSuccess;
  if (grid.shared > kDefaultShared) {
    // Always the same value, as other threads may launch the kernel meanwhile.
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
  }
  if (status == cudaSuccess && grid.cluster > kPortableCluster) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return status;
}

// How many clusters of a grid run at once, which need as many free multiprocessors next to each other; 0 where the
// device refuses them.
template <class Kernel>
int64_t active_clusters(Kernel* kernel, const Grid& grid, Stream stream) {
  int active = 0;
  const LaunchConfig config(grid, stream);
  if (cudaOccupancyMaxActiveClusters(&active, kernel, &config.config) == cudaSuccess) return active;
  cudaGetLastError();
  return 0;
}

}  // namespace lkv::cuda
