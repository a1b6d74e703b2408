#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <tuple>
#include <utility>

#include "lkv/cuda.h"
#include "select_sizes.h"

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

// Properties that the driver reports and that stay the same while the process runs; each is queried once. Thread-safe.
template <class Key, class Value>
class Memo {
 public:
  template <class Ask>
  Status find(const Key& key, Value& out, Ask&& ask) {
    {
      std::shared_lock lock(door_);
      if (const auto known = known_.find(key); known != known_.end()) {
        out = known->second;
        return cudaSuccess;
      }
    }
    const Status status = ask();
    if (status == cudaSuccess) {
      std::unique_lock lock(door_);
      known_.emplace(key, out);
    }
    return status;
  }

 private:
  std::shared_mutex door_;
  std::map<Key, Value> known_;
};

// The current device, as far as launches of one kernel depend on it.
struct Device {
  int index = 0;
  int multiprocessors = 0;
  int shared_per_block = 0;  // with the opt-in
  bool clusters = false;     // clusters and dependent launches

  // The code of the kernel decides, not the device: code that was compiled for an older architecture, and translated
  // when it was loaded, has no griddepcontrol.wait, so a dependent launch of it would race with the grid in front.
  template <class... Params>
  static Status of(void (*kernel)(Params...), Device& out) {
    static Memo<std::pair<int, const void*>, Device> known;
    if (const Status status = cudaGetDevice(&out.index); status != cudaSuccess) return status;
    return known.find({out.index, reinterpret_cast<const void*>(kernel)}, out, [&]() -> Status {
      cudaFuncAttributes code = {};
      Status status = cudaFuncGetAttributes(&code, kernel);
      out.clusters = code.ptxVersion >= 90;
      if (status == cudaSuccess) {
        status = cudaDeviceGetAttribute(&out.multiprocessors, cudaDevAttrMultiProcessorCount, out.index);
      }
      if (status == cudaSuccess) {
        status = cudaDeviceGetAttribute(&out.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, out.index);
      }
      return status;
    });
  }
};

// Allows a kernel the shared memory and the cluster size of a grid. `active`: how many of its clusters run at once,
// each on as many free multiprocessors of one group; 0 where the device refuses them, and kMaxBlocks for clusters of
// one block.
template <class... Params>
Status allow(void (*kernel)(Params...), const Grid& grid, const Device& device, int64_t& active) {
  static Memo<std::tuple<int, const void*, int, size_t>, int64_t> known;
  const auto* function = reinterpret_cast<const void*>(kernel);
  return known.find({device.index, function, grid.cluster, grid.shared}, active, [&]() -> Status {
    if (grid.shared > kDefaultShared) {
      // Always the same value, as other threads may launch the kernel meanwhile.
      const Status status =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
      if (status != cudaSuccess) return status;
    }
    active = kMaxBlocks;
    if (grid.cluster == 1) return cudaSuccess;
    int clusters = 0;
    // The cluster is the only attribute, and there is no stream: the stream of the call may be capturing, and a driver
    // may refuse other attributes.
    const LaunchConfig config(
        {.blocks = grid.cluster, .block = grid.block, .shared = grid.shared, .cluster = grid.cluster}, nullptr);
    const bool allowed =
        (grid.cluster <= kPortableCluster ||
         cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess) &&
        cudaOccupancyMaxActiveClusters(&clusters, kernel, &config.config) == cudaSuccess;
    if (!allowed) cudaGetLastError();
    active = allowed ? clusters : 0;
    return cudaSuccess;
  });
}

}  // namespace lkv::cuda
