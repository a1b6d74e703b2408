#include "emulator/device.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>

#include "scheduler.h"
#include "weak.h"

namespace emulator {
namespace {

Scheduler& scheduler() {
  return Scheduler::instance();
}

// Nearly always one literal; another translation unit may have a copy of it.
bool same_text(const char* a, const char* b) {
  return a == b || std::string_view(a) == b;
}

std::string place(Where where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

}  // namespace

void block_barrier(Where where) {
  Thread& self = scheduler().current();
  Barrier& barrier = self.block->barrier;
  if (!barrier.waiting.empty()) {
    const Where other = barrier.waiting.front()->where;
    if (other.line() != where.line() || !same_text(other.file_name(), where.file_name())) {
      self.where = where;
      scheduler().fail("divergent block barrier: threads of one block meet at " + place(other) + " and at " +
                       place(where));
    }
  }
  if (barrier.arrive(self)) {
    scheduler().release(&barrier.waiting);
    scheduler().preemption_point();
  } else {
    barrier.waiting.push_back(&self);
    scheduler().wait("block barrier", where);
  }
  self.known = barrier.known;
}

// Code that was compiled for an older architecture has none of what follows, on any device.

void cluster_arrive(Where where) {
  if (scheduler().old_code()) return;
  Thread& self = scheduler().current();
  if (self.arrived_at_cluster) scheduler().fail("second arrival at a cluster barrier without a wait, " + place(where));
  Barrier& barrier = self.block->cluster->barrier;
  self.arrived_at_cluster = true;
  self.arrival = barrier.phase;
  if (barrier.arrive(self)) scheduler().release(&barrier.waiting);
  scheduler().preemption_point();
}

void cluster_wait(Where where) {
  if (scheduler().old_code()) return block_barrier(where);
  Thread& self = scheduler().current();
  if (!self.arrived_at_cluster) scheduler().fail("wait at a cluster barrier without an arrival, " + place(where));
  self.arrived_at_cluster = false;
  Barrier& barrier = self.block->cluster->barrier;
  if (self.arrival == barrier.phase) {
    barrier.waiting.push_back(&self);
    scheduler().wait("cluster barrier", where);
  }
  self.known = std::max(self.known, barrier.known);
}

unsigned cluster_rank() {
  return scheduler().old_code() ? 0 : scheduler().current().block->rank;
}
unsigned cluster_size() {
  if (scheduler().old_code()) return 1;
  return static_cast<unsigned>(scheduler().current().block->cluster->blocks.size());
}
unsigned lane() {
  return scheduler().current().index % 32;
}

std::array<uint64_t, 32> warp_exchange(const char* kind, uint32_t mask, uint64_t value, Where where) {
  Thread& self = scheduler().current();
  Warp& warp = self.block->warps[self.index / 32];
  const unsigned lane = self.index % 32;
  self.mask = mask;
  self.where = where;
  if (!(mask >> lane & 1)) scheduler().fail(std::string(kind) + " by a lane outside of its own mask, " + place(where));
  if (mask & ~warp.live) {
    scheduler().fail(std::string(kind) + ": the mask names a lane that does not exist or has exited, " + place(where));
  }
  WarpOperation& operation = warp.operation(kind, mask);
  if (!same_text(operation.kind, kind)) {
    scheduler().fail(std::string("lanes of one mask meet in ") + operation.kind + " and in " + kind + ", " +
                     place(where));
  }
  operation.arrived |= uint32_t{1} << lane;
  operation.words[lane] = value;
  operation.known = std::max(operation.known, self.known);
  if (operation.arrived != mask) {
    operation.waiting.push_back(&self);
    scheduler().wait(kind, where);
  } else {
    scheduler().release(&operation.waiting);
    scheduler().preemption_point();
  }
  operation.inside &= ~(uint32_t{1} << lane);
  if (kind == syncwarp) self.known = operation.known;
  return operation.words;
}

void stale_lane(const char* kind, uint32_t mask, unsigned source, Where where) {
  char text[96];
  std::snprintf(text, sizeof text, "%s reads lane %u, which is not in mask 0x%08x, ", kind, source, mask);
  scheduler().fail("stale shuffle: " + (text + place(where)));
}

void preemption_point() {
  weak::settle();
  scheduler().preemption_point();
}
void progress() {
  scheduler().progress();
}
void publish() {
  scheduler().publish();
}
void acquired(const void* flag) {
  weak::acquire(flag);
}
void released(const void* flag) {
  weak::release(flag);
}
void spin_pause(Where where) {
  scheduler().pause(where);
}

void* shared_memory() {
  return scheduler().current().block->shared;
}

void* shared_memory_of(const void* own, unsigned rank, Where where) {
  if (scheduler().old_code()) return const_cast<void*>(own);
  const Block& block = *scheduler().current().block;
  const auto& blocks = block.cluster->blocks;
  const auto offset = reinterpret_cast<uintptr_t>(own) - reinterpret_cast<uintptr_t>(block.shared);
  if (rank >= blocks.size()) scheduler().fail("no block of this rank in the cluster, " + place(where));
  if (offset >= block.cluster->grid->shared_bytes) {
    scheduler().fail("maps an address that is not in the shared memory of the block, " + place(where));
  }
  if (blocks[rank]->live == 0) scheduler().fail("maps the shared memory of an exited block, " + place(where));
  return blocks[rank]->shared + offset;
}

void grid_dependency_wait(Where where) {
  if (scheduler().old_code()) return preemption_point();
  Grid* before = scheduler().current().block->cluster->grid->before.get();
  if (before == nullptr || before->finished) {
    preemption_point();
  } else {
    before->waiting.push_back(&scheduler().current());
    scheduler().wait("grid dependency", where);
  }
  weak::wait_for_all();
}

void trigger_dependents() {
  if (scheduler().old_code()) return;
  scheduler().trigger();
}

}  // namespace emulator
