#include <vector>

#include "gather_units.h"
#include "select_units.h"

namespace lkv::cpu {

// Units are taken in order, those of the select first: whoever waits for a row set in the gather waits for a thread
// that is at work on it and waits for nobody.
void evict(SelectParams select, GatherParams gather, const Threads& threads) {
  std::vector<uint32_t> ready(static_cast<size_t>(select.source.rows()));
  select.ready = ready.data();
  gather.ready = ready.data();
  const int64_t workers = std::max(select_workers(select, threads), gather_workers(gather, threads));
  const SelectUnits selects(select, workers);
  const GatherUnits gathers(gather, workers);
  for_each_unit(threads, workers, selects.count() + gathers.count(), [&](int64_t unit, int64_t worker) {
    if (unit < selects.count()) {
      selects.run(unit, worker);
    } else {
      gathers.run(unit - selects.count());
    }
  });
}

}  // namespace lkv::cpu
