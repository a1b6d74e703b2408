#pragma once

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "primitives.cuh"

// Small kernels, each in a correct version and in one with a planted bug. A toy returns how many results are wrong.

namespace toy {

using Run = int (*)(bool broken);

struct Toy {
  Run run;
  int code;
};

inline std::map<std::string, Toy>& toys() {
  static std::map<std::string, Toy> map;
  return map;
}

struct Register {
  // `code`: what the kernels of the toy were compiled for.
  Register(const char* name, Run run, int code = 90) { toys()[name] = {run, code}; }
};

struct Shape {
  unsigned blocks, threads, cluster = 1;
  size_t shared_bytes = 0;
  bool dependent = false;
};

template <class... Parameters, class... Arguments>
void launch(Shape shape, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{.gridDim = shape.blocks, .blockDim = shape.threads};
  config.dynamicSmemBytes = shape.shared_bytes;
  config.attrs = attributes;
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {shape.cluster, 1, 1};
  }
  if (shape.dependent) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...); error != cudaSuccess) {
    std::fprintf(stderr, "launch: %s\n", cudaGetErrorString(error));
    std::exit(2);
  }
}

// Memory of exactly n numbers.
template <class T>
class Array {
 public:
  explicit Array(size_t n, T value = T{}) : n_(n), data_(static_cast<T*>(emulator_allocate(n * sizeof(T)))) {
    for (size_t i = 0; i < n; ++i) data_[i] = value;
  }
  ~Array() { emulator_free(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  T* data() { return data_; }
  size_t size() const { return n_; }
  T& operator[](size_t i) { return data_[i]; }

  template <class F>
  int wrong(F&& expected) const {
    int count = 0;
    for (size_t i = 0; i < n_; ++i) count += data_[i] != expected(i);
    return count;
  }

 private:
  size_t n_;
  T* data_;
};

}  // namespace toy
