#include <vector>

#include "gather_units.h"
#include "select_units.h"

namespace lkv::cpu {

// Whoever waits for a segment in the gather waits for a thread that is at work on it and waits for nobody, as all of
// the select is taken before any of the gather.
void evict(SelectParams select, GatherParams gather, const Threads& threads) {
  std::vector<uint32_t> ready(static_cast<size_t>(select.source.rows()));
  select.ready = ready.data();
  gather.ready = ready.data();
  const int64_t workers = std::max(select_workers(select, threads), gather_workers(gather, threads));
  const SelectUnits selects(select, workers);
  const GatherUnits gathers(gather, workers);
  UnitQueue selecting(selects.count(), workers), moving(gathers.count(), workers);
  for_each_worker(threads, workers, [&](int64_t worker) {
    selecting.drain(worker, [&](int64_t unit) { selects.run(unit, worker); });
    moving.drain(worker, [&](int64_t unit) { gathers.run(unit); });
  });
}

}  // namespace lkv::cpu
