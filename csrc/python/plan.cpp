#include "plan.h"

#include <pybind11/functional.h>

#include "cuda/select_sizes.h"

namespace py = pybind11;

namespace lkv::python {

py::dict plan_select(int64_t segments, int64_t longest, int64_t multiprocessors, int64_t shared_per_block,
                     const ActiveClusters& active, bool beside) {
  using namespace lkv::cuda;
  const SelectSizes x = {
      .rows = segments, .longest = longest, .multiprocessors = multiprocessors, .shared_per_block = shared_per_block};
  Plan plan = plan_clusters(x);
  const auto ask = [&](const Plan& plan) { return active(plan.cluster, static_cast<int64_t>(plan.shared)); };
  const int64_t at_once = settle(x, plan, ask);
  py::dict found;
  found["cluster"] = plan.cluster;
  // A select alone has both halves of a multiprocessor; a gather beside it gets one.
  found["clusters"] = clusters_of(x, plan, at_once, beside ? 1 : 2);
  found["warp_keys"] = x.part(plan.cluster);
  found["keys_in"] = plan.keys_in == KeysIn::registers ? "registers" : plan.on_chip ? "shared" : "memory";
  found["shared"] = plan.shared;
  return found;
}

}  // namespace lkv::python
