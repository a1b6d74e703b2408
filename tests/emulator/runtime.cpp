#include <cuda_runtime.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <tuple>

#include "scheduler.h"
#include "weak.h"

// The host side of the shim: what a device would refuse is refused here.

namespace emulator {
namespace {

struct Limits {
  size_t shared_default = 48 << 10, shared_optin, shared_total;
  unsigned cluster, cluster_portable;
};

Limits limits() {
  if (Scheduler::instance().options().capability >= 90) return {48 << 10, 227 << 10, 228 << 10, 16, 8};
  return {48 << 10, 163 << 10, 164 << 10, 1, 1};
}

struct KernelAttributes {
  size_t shared_bytes = 48 << 10;
  bool large_clusters = false;
};

// The device that the host has at this moment: one for every size and architecture that was ever configured, so that
// what a launcher remembers of one is not what another one is.
int device() {
  static std::mutex door;
  static std::map<std::tuple<int, int, int>, int> devices;
  const Options& options = Scheduler::instance().options();
  std::lock_guard lock(door);
  return devices.emplace(std::tuple(options.resident, options.capability, options.code), devices.size()).first->second;
}

// The attributes of every kernel on every device. Launches may come from several threads.
class Attributes {
 public:
  KernelAttributes of(const void* kernel) {
    std::lock_guard lock(door_);
    return map_[{kernel, device()}];
  }
  template <class F>
  void change(const void* kernel, F&& f) {
    std::lock_guard lock(door_);
    f(map_[{kernel, device()}]);
  }

  static Attributes& instance() {
    static Attributes attributes;
    return attributes;
  }

 private:
  std::mutex door_;
  std::map<std::pair<const void*, int>, KernelAttributes> map_;
};

std::atomic<unsigned> questions = 0;

uint64_t volume(dim3 d) {
  return uint64_t{d.x} * d.y * d.z;
}

cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel, const Grid& grid) {
  const Limits limit = limits();
  const KernelAttributes own = Attributes::instance().of(kernel);
  const dim3 g = grid.blocks, b = grid.threads, c = grid.cluster;
  if (volume(g) == 0 || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) return cudaErrorInvalidConfiguration;
  if (volume(b) == 0 || volume(b) > 1024 || b.z > 64) return cudaErrorInvalidConfiguration;
  if (volume(c) == 0 || volume(c) > (own.large_clusters ? limit.cluster : limit.cluster_portable)) {
    return cudaErrorInvalidClusterSize;
  }
  if (g.x % c.x || g.y % c.y || g.z % c.z) return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > own.shared_bytes) return cudaErrorInvalidValue;
  return cudaSuccess;
}

cudaError_t host_task(cudaStream_t stream, Body body) {
  auto grid = std::make_shared<Grid>();
  grid->body = std::move(body);
  grid->cluster_count = 1;
  Scheduler::instance().launch(stream, std::move(grid));
  return cudaSuccess;
}

}  // namespace

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  ++questions;
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || static_cast<size_t>(value) > limits().shared_optin) return cudaErrorInvalidValue;
    Attributes::instance().change(kernel, [&](auto& own) { own.shared_bytes = static_cast<size_t>(value); });
  } else if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    if (limits().cluster == 1) return cudaErrorNotSupported;
    Attributes::instance().change(kernel, [&](auto& own) { own.large_clusters = value != 0; });
  }
  return cudaSuccess;
}

cudaError_t get_attributes(cudaFuncAttributes* attributes) {
  ++questions;
  const Options& options = Scheduler::instance().options();
  *attributes = {.ptxVersion = options.code, .binaryVersion = options.capability};
  return cudaSuccess;
}

// Only the cluster attribute: some drivers refuse any other, and then a launcher would do without clusters.
cudaError_t active_clusters(int* clusters, const cudaLaunchConfig_t& config) {
  ++questions;
  unsigned size = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& a = config.attrs[i];
    if (a.id != cudaLaunchAttributeClusterDimension) {
      Scheduler::instance().fail("cudaOccupancyMaxActiveClusters of more than a cluster");
    }
    size = a.val.clusterDim.x * a.val.clusterDim.y * a.val.clusterDim.z;
  }
  if (size == 0 || size > limits().cluster) return cudaErrorInvalidClusterSize;
  *clusters = Scheduler::instance().options().resident / static_cast<int>(size);
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, Body body) {
  auto grid = std::make_shared<Grid>();
  grid->body = std::move(body);
  grid->kernel = true;
  grid->blocks = config.gridDim;
  grid->threads = config.blockDim;
  grid->shared_bytes = config.dynamicSmemBytes;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& a = config.attrs[i];
    if (limits().cluster == 1) return cudaErrorNotSupported;
    if (a.id == cudaLaunchAttributeClusterDimension) {
      grid->cluster = {a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z};
    } else if (a.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      grid->programmatic = a.val.programmaticStreamSerializationAllowed != 0;
    }
  }
  if (const cudaError_t error = check(config, kernel, *grid); error != cudaSuccess) return error;
  grid->cluster_count = volume(grid->blocks) / volume(grid->cluster);
  return Scheduler::instance().launch(config.stream, std::move(grid)) ? cudaSuccess : cudaErrorNotSupported;
}

}  // namespace emulator

using emulator::Scheduler;

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInsufficientDriver:
      return "cudaErrorInsufficientDriver";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorLaunchOutOfResources:
      return "cudaErrorLaunchOutOfResources";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    case cudaErrorInvalidClusterSize:
      return "cudaErrorInvalidClusterSize";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = emulator::device();
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != emulator::device()) return cudaErrorInvalidDevice;
  ++emulator::questions;
  const emulator::Options& options = Scheduler::instance().options();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = options.resident;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = options.capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = options.capability % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(emulator::limits().shared_total);
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(emulator::limits().shared_optin);
      break;
    case cudaDevAttrClusterLaunch:
      *value = emulator::limits().cluster > 1;
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream) {
  return emulator::host_task(stream, [=] { std::memset(data, value, bytes); });
}

int emulator_configure(const char* schedule, unsigned long long seed, int resident, int capability, int code,
                       int eager) {
  const auto known = [](int architecture) { return architecture == 80 || architecture == 90; };
  emulator::Options options{emulator::Schedule::in_order, seed, resident, capability, code, eager != 0};
  if (!emulator::parse(schedule, &options.schedule) || resident < 1) return 1;
  if (!known(capability) || !known(code) || code > capability) return 1;
  Scheduler::instance().configure(options);
  return 0;
}

unsigned emulator_questions() {
  return emulator::questions;
}

void emulator_synchronize() {
  Scheduler::instance().run();
}

void* emulator_allocate(size_t bytes) {
#if defined(LKV_EMULATOR_WEAK)
  void* data = emulator::weak::allocate(bytes);
  if (data == nullptr) return nullptr;
#else
  void* data = nullptr;
  if (posix_memalign(&data, 256, bytes) != 0) return nullptr;
#endif
  std::memset(data, 0xa5, bytes);
  return data;
}

void emulator_free(void* data) {
#if defined(LKV_EMULATOR_WEAK)
  if (data != nullptr) emulator::weak::free();
#else
  std::free(data);
#endif
}
