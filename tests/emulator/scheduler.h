#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <deque>
#include <memory>
#include <mutex>
#include <source_location>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator/device.h"
#include "fiber.h"
#include "policy.h"

// Grids, clusters, blocks and threads, and who runs next. One fiber runs at a time, so nothing in here is locked but
// the two doors from outside, launch() and run().

namespace emulator {

struct Block;
struct Cluster;
struct Grid;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  unsigned index = 0;  // in the block, x fastest
  uint64_t priority = 0;
  bool done = false;
  bool arrived_at_cluster = false;
  uint64_t arrival = 0;            // phase of the cluster barrier it arrived in
  const char* waits_at = nullptr;  // kind of the barrier, nullptr while runnable
  Where where;
  uint32_t mask = 0;   // of a warp operation
  uint32_t known = 0;  // up to when it knows what other grids wrote (see weak.h)
};

// Complete when `expected` threads have come; a thread that exited never comes.
struct Barrier {
  unsigned expected = 0;
  unsigned arrived = 0;
  uint64_t phase = 0;
  uint32_t known = 0;  // what all that have come know
  std::vector<Thread*> waiting;

  // True for the thread that completes the phase.
  bool arrive(const Thread& thread) {
    known = std::max(known, thread.known);
    if (++arrived < expected) return false;
    arrived = 0;
    ++phase;
    return true;
  }
};

struct WarpOperation {
  const char* kind = nullptr;
  uint32_t mask = 0;
  uint32_t arrived = 0;  // lanes that have come
  uint32_t inside = 0;   // lanes that have not left
  uint32_t known = 0;
  std::array<uint64_t, 32> words{};
  std::vector<Thread*> waiting;
};

struct Warp {
  uint32_t live = 0;  // lanes that have not exited
  std::vector<std::unique_ptr<WarpOperation>> operations;

  // The operation that lanes of this mask may still join, or a new one.
  WarpOperation& operation(const char* kind, uint32_t mask) {
    WarpOperation* spare = nullptr;
    for (auto& each : operations) {
      if (each->inside == 0) spare = each.get();
      if (each->inside != 0 && each->mask == mask && each->arrived != mask) return *each;
    }
    if (spare == nullptr) spare = operations.emplace_back(std::make_unique<WarpOperation>()).get();
    spare->kind = kind;
    spare->mask = spare->inside = mask;
    spare->arrived = spare->known = 0;
    spare->words = {};
    return *spare;
  }
};

struct Block {
  Cluster* cluster = nullptr;
  unsigned rank = 0;
  uint3 index{};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned live = 0;
  bool started = false, triggered = false;
  char* shared = nullptr;
  Barrier barrier;
};

struct Cluster {
  Grid* grid = nullptr;
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned live = 0;  // blocks
  Barrier barrier;
};

struct Grid {
  Body body;
  dim3 blocks, threads, cluster;
  size_t shared_bytes = 0;
  bool programmatic = false;  // may start once the grid before it has been triggered by all of its blocks
  bool kernel = false;        // otherwise an operation of the host
  std::shared_ptr<Grid> before;
  unsigned ordinal = 0;
  uint32_t known = 0;  // of its threads when they begin

  uint64_t clusters_started = 0, cluster_count = 0;
  uint64_t blocks_live = 0, blocks_released = 0;  // released: triggered or exited
  std::vector<std::unique_ptr<Cluster>> clusters;
  bool finished = false;
  std::vector<Thread*> waiting;  // grid_dependency_wait of the grid behind

  uint64_t block_count() const { return uint64_t{blocks.x} * blocks.y * blocks.z; }
  bool may_start() const {
    return !before || before->finished || (programmatic && before->blocks_released == before->block_count());
  }
};

struct Options {
  Schedule schedule = Schedule::in_order;
  uint64_t seed = 0;
  int resident = 16;
  int capability = 90;  // of the device
  int code = 90;        // what the kernels were compiled for, if only just in time for the device
  bool eager = false;
};

class Scheduler {
 public:
  static Scheduler& instance();

  void configure(const Options& options);
  const Options& options() const { return options_; }
  // False for a dependent launch behind something that is no kernel, which a stream capture may refuse.
  bool launch(cudaStream_t stream, std::shared_ptr<Grid> grid);
  void run();

  // For the running thread.
  bool runs() const { return current_ != nullptr; }
  Thread& current() { return *current_; }
  bool old_code() const { return options_.code < 90; }
  void wait(const char* kind, Where where);
  void release(std::vector<Thread*>* threads);
  void preemption_point();
  void progress() { ++progress_; }
  void publish();
  void pause(Where where);
  void trigger();
  [[noreturn]] void fail(const std::string& what) const;

 private:
  using Ready = std::pair<uint64_t, Thread*>;

  Scheduler();
  void admit();
  void start_cluster(Grid& grid);
  void start_block(Block& block);
  void finish_thread(Thread& thread);
  void finish_block(Block& block);
  void finish_grid(Grid& grid);
  void make_ready(Thread& thread);
  void wake_spinning();
  Thread* pick();
  void resume(Thread& thread);
  std::string report() const;

  Options options_;
  Policy policy_;
  Random garbage_;  // contents of uninitialised shared memory
  StackPool stacks_;
  std::recursive_mutex door_;
  std::deque<std::shared_ptr<Grid>> grids_;  // launched and not finished, in order
  std::unordered_map<cudaStream_t, std::shared_ptr<Grid>> last_;
  std::vector<Ready> ready_;  // heap
  std::vector<Thread*> spinning_;
  Thread* current_ = nullptr;
  uint64_t resident_ = 0, resident_threads_ = 0, sequence_ = 0, progress_ = 0, progress_seen_ = 0, idle_rounds_ = 0;
  unsigned launches_ = 0;
  bool admission_due_ = false;
};

}  // namespace emulator
