#include <vector>

#include "units.h"

namespace lkv::cpu {

// Select and gather in one parallel region. Every thread first takes units of the select, then tiles of the gather; a
// tile waits for the flags of its segments. No thread starts a tile while a unit of the select is free, so a tile waits
// for a thread that is busy with a select, and a select never waits: there is no deadlock.
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
