#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>

namespace lkv::python {

// (blocks of a cluster, bytes of shared memory of each) -> how many such clusters run at once.
using ActiveClusters = std::function<int64_t(int64_t, int64_t)>;

// How the CUDA kernels would launch a select, alone or with a gather beside it, on a device of these limits.
pybind11::dict plan_select(int64_t segments, int64_t longest, int64_t multiprocessors, int64_t shared_per_block,
                           const ActiveClusters& active, bool beside);

}  // namespace lkv::python
