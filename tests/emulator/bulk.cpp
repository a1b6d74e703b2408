#include <algorithm>
#include <cstring>
#include <string>
#include <unordered_map>

#include "scheduler.h"

// Arrival barriers and bulk copies. What a device does at any time in between is done as late as it may be.

namespace emulator {
namespace {

struct Copy {
  void* to;
  const void* from;
  unsigned bytes;

  void make() const { std::memcpy(to, from, bytes); }
};

struct Arrivals {
  unsigned threads = 0, arrived = 0, parity = 0;
  uint64_t expected = 0;
  uint32_t known = 0;  // what those that arrived know
  std::vector<Copy> copies;
};

// Known by their address, from make_barrier on; one fiber runs at a time.
std::unordered_map<const uint64_t*, Arrivals> barriers;
std::unordered_map<const Thread*, std::vector<Copy>> stores;

[[noreturn]] void fail(const char* what, Where where) {
  Scheduler::instance().fail(std::string(what) + ", " + where.file_name() + ":" + std::to_string(where.line()));
}

Arrivals& find(const uint64_t* barrier, Where where) {
  const auto found = barriers.find(barrier);
  if (found == barriers.end()) fail("an arrival barrier that nobody has made", where);
  return found->second;
}

void check(const void* a, const void* b, unsigned bytes, Where where) {
  if ((reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | bytes) % 16 != 0) {
    fail("a bulk copy of other than multiples of 16 bytes", where);
  }
}

bool old_code() {
  return Scheduler::instance().old_code();
}

}  // namespace

// None of these does anything in code that was compiled for an older architecture.

void make_barrier(uint64_t* barrier, unsigned threads) {
  if (old_code()) return;
  barriers[barrier] = {.threads = threads};
}

void arrive_expecting(uint64_t* barrier, unsigned bytes, Where where) {
  if (old_code()) return;
  Arrivals& arrivals = find(barrier, where);
  arrivals.expected += bytes;
  arrivals.known = std::max(arrivals.known, Scheduler::instance().current().known);
  if (++arrivals.arrived > arrivals.threads) fail("an arrival barrier with too many arrivals", where);
  publish();
}

void wait_arrivals(uint64_t* barrier, unsigned parity, Where where) {
  if (old_code()) return;
  preemption_point();
  while (true) {
    Arrivals& arrivals = find(barrier, where);
    uint32_t& known = Scheduler::instance().current().known;
    if (arrivals.parity != parity) {
      known = std::max(known, arrivals.known);
      return;
    }
    uint64_t loaded = 0;
    for (const Copy& copy : arrivals.copies) loaded += copy.bytes;
    if (loaded > arrivals.expected && arrivals.arrived == arrivals.threads) fail("more bytes than expected", where);
    if (arrivals.arrived == arrivals.threads && loaded == arrivals.expected) {
      for (const Copy& copy : arrivals.copies) copy.make();
      known = std::max(known, arrivals.known);
      arrivals = {.threads = arrivals.threads, .parity = parity ^ 1, .known = arrivals.known};
      publish();
      return;
    }
    spin_pause(where);
  }
}

void bulk_load(void* shared, const void* global, unsigned bytes, uint64_t* barrier, Where where) {
  if (old_code()) return;
  check(shared, global, bytes, where);
  find(barrier, where).copies.push_back({shared, global, bytes});
  publish();
}

void bulk_store(void* global, const void* shared, unsigned bytes, Where where) {
  if (old_code()) return;
  check(global, shared, bytes, where);
  stores[&Scheduler::instance().current()].push_back({global, shared, bytes});
  preemption_point();
}

void wait_bulk_stores() {
  preemption_point();
  for (const Copy& copy : stores[&Scheduler::instance().current()]) copy.make();
  stores.erase(&Scheduler::instance().current());
  progress();
}

}  // namespace emulator
