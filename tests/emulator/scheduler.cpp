#include "scheduler.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "weak.h"

#if defined(LKV_EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#define LKV_POISON(data, bytes) __asan_poison_memory_region(data, bytes)
#define LKV_UNPOISON(data, bytes) __asan_unpoison_memory_region(data, bytes)
#else
#define LKV_POISON(data, bytes) ((void)0)
#define LKV_UNPOISON(data, bytes) ((void)0)
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

// Rounds in which every live thread looked at its flag and nothing in memory changed.
constexpr uint64_t hopeless_rounds = 1000;

// Every stack is two mappings of the process, and a Linux process has 65530 of them.
constexpr uint64_t most_threads = 16 << 10;

uint64_t volume(dim3 d) {
  return uint64_t{d.x} * d.y * d.z;
}

void fill(Random& random, char* data, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 8) {
    const uint64_t word = random.next();
    std::memcpy(data + i, &word, std::min<size_t>(8, bytes - i));
  }
}

void thread_entry(void* argument) {
  auto* thread = static_cast<Thread*>(argument);
  thread->block->cluster->grid->body();
  thread->done = true;
  thread->fiber.finish();
}

}  // namespace

Scheduler& Scheduler::instance() {
  static Scheduler scheduler;
  return scheduler;
}

Scheduler::Scheduler() {
  Options options;
  if (const char* name = std::getenv("LKV_EMULATOR_SCHEDULE")) parse(name, &options.schedule);
  if (const char* seed = std::getenv("LKV_EMULATOR_SEED")) options.seed = std::strtoull(seed, nullptr, 10);
  if (const char* capability = std::getenv("LKV_EMULATOR_CAPABILITY")) {
    options.capability = options.code = std::atoi(capability);
  }
  options.eager = std::getenv("LKV_EMULATOR_EAGER") != nullptr;
  configure(options);
}

void Scheduler::configure(const Options& options) {
  options_ = options;
  policy_ = Policy(options.schedule, options.seed);
  garbage_ = Random(~options.seed);
  weak::seed(options.seed);
}

bool Scheduler::launch(cudaStream_t stream, std::shared_ptr<Grid> grid) {
  std::lock_guard lock(door_);
  auto& last = last_[stream];
  if (grid->programmatic && last && !last->kernel) return false;
  grid->ordinal = launches_++;
  grid->before = last;
  last = grid;
  grids_.push_back(std::move(grid));
  if (options_.eager) run();
  return true;
}

void Scheduler::run() {
  std::lock_guard lock(door_);
  admission_due_ = true;
  while (true) {
    if (admission_due_) admit();
    Thread* thread = pick();
    if (thread == nullptr) break;
    resume(*thread);
    if (thread->done) finish_thread(*thread);
  }
  if (!grids_.empty()) fail("deadlock");
  last_.clear();
}

// In launch order, whole clusters at a time. A grid that cannot start or does not fit holds back those behind it.
void Scheduler::admit() {
  admission_due_ = false;
  for (size_t i = 0; i < grids_.size(); ++i) {
    Grid& grid = *grids_[i];
    if (!grid.may_start()) return;
    const uint64_t size = volume(grid.cluster), threads = size * volume(grid.threads);
    while (grid.clusters_started < grid.cluster_count) {
      const bool full = resident_ + size > static_cast<uint64_t>(options_.resident);
      if (resident_ != 0 && (full || resident_threads_ + threads > most_threads)) return;
      start_cluster(grid);
    }
  }
}

void Scheduler::start_cluster(Grid& grid) {
  // A dependent launch promises nothing about the grid in front of it, even once that has ended.
  if (grid.clusters_started == 0) grid.known = grid.programmatic && grid.before ? grid.before->known : weak::tick();
  auto cluster = std::make_unique<Cluster>();
  cluster->grid = &grid;
  const dim3 c = grid.cluster;
  const uint64_t n = grid.clusters_started++;
  const uint64_t across = grid.blocks.x / c.x, down = grid.blocks.y / c.y;
  const uint3 first{static_cast<unsigned>(n % across) * c.x, static_cast<unsigned>(n / across % down) * c.y,
                    static_cast<unsigned>(n / across / down) * c.z};
  for (unsigned rank = 0; rank < c.x * c.y * c.z; ++rank) {
    auto block = std::make_unique<Block>();
    block->cluster = cluster.get();
    block->rank = rank;
    block->index = {first.x + rank % c.x, first.y + rank / c.x % c.y, first.z + rank / c.x / c.y};
    start_block(*block);
    cluster->blocks.push_back(std::move(block));
  }
  cluster->live = static_cast<unsigned>(cluster->blocks.size());
  cluster->barrier.expected = cluster->live * static_cast<unsigned>(cluster->blocks[0]->threads.size());
  resident_ += cluster->live;
  resident_threads_ += cluster->barrier.expected;
  grid.blocks_live += cluster->live;
  grid.clusters.push_back(std::move(cluster));
}

void Scheduler::start_block(Block& block) {
  const Grid& grid = *block.cluster->grid;
  const auto threads = static_cast<unsigned>(volume(grid.threads));
  block.threads = std::vector<Thread>(threads);
  block.warps.resize((threads + 31) / 32);
  block.live = block.barrier.expected = threads;
  if (grid.shared_bytes > 0) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, grid.shared_bytes) != 0) throw std::bad_alloc();
    block.shared = static_cast<char*>(memory);
    LKV_POISON(block.shared, grid.shared_bytes);  // until the block runs, no other block of its cluster may access it
  }
  uint64_t warp_draw = 0;
  for (unsigned i = 0; i < threads; ++i) {
    Thread& thread = block.threads[i];
    if (i % 32 == 0) warp_draw = policy_.draw();
    block.warps[i / 32].live |= uint32_t{1} << (i % 32);
    thread.block = &block;
    thread.index = i;
    thread.known = grid.known;
    thread.priority = policy_.priority(sequence_++, warp_draw);
    thread.fiber.prepare(stacks_.take(), thread_entry, &thread);
    make_ready(thread);
  }
}

void Scheduler::make_ready(Thread& thread) {
  thread.waits_at = nullptr;
  ready_.emplace_back(thread.priority, &thread);
  std::push_heap(ready_.begin(), ready_.end());
}

void Scheduler::wake_spinning() {
  for (Thread* thread : spinning_) make_ready(*thread);
  spinning_.clear();
}

Thread* Scheduler::pick() {
  if (ready_.empty()) {
    if (spinning_.empty()) return nullptr;
    idle_rounds_ = progress_ == progress_seen_ ? idle_rounds_ + 1 : 0;
    progress_seen_ = progress_;
    if (idle_rounds_ > hopeless_rounds)
      fail("livelock: no thread is left to change what the spinning threads wait for");
    wake_spinning();
  }
  std::pop_heap(ready_.begin(), ready_.end());
  Thread* thread = ready_.back().second;
  ready_.pop_back();
  return thread;
}

void Scheduler::resume(Thread& thread) {
  Block& block = *thread.block;
  const Grid& grid = *block.cluster->grid;
  if (!block.started) {
    block.started = true;
    LKV_UNPOISON(block.shared, grid.shared_bytes);
    fill(garbage_, block.shared, grid.shared_bytes);
  }
  thread.waits_at = nullptr;
  current_ = &thread;
  blockDim = grid.threads;
  gridDim = grid.blocks;
  blockIdx = block.index;
  threadIdx = {thread.index % blockDim.x, thread.index / blockDim.x % blockDim.y,
               thread.index / blockDim.x / blockDim.y};
  thread.fiber.resume();
  weak::settle();
  current_ = nullptr;
}

void Scheduler::finish_thread(Thread& thread) {
  stacks_.put(thread.fiber.stack());
  progress();
  Block& block = *thread.block;
  block.warps[thread.index / 32].live &= ~(uint32_t{1} << (thread.index % 32));
  if (--block.live == 0) finish_block(block);
}

// The shared memory of an exited block stays mapped, but its contents are lost.
void Scheduler::finish_block(Block& block) {
  Cluster& cluster = *block.cluster;
  Grid& grid = *cluster.grid;
  fill(garbage_, block.shared, grid.shared_bytes);
  LKV_POISON(block.shared, grid.shared_bytes);
  if (!block.triggered) ++grid.blocks_released;
  block.triggered = true;
  --resident_;
  resident_threads_ -= block.threads.size();
  --grid.blocks_live;
  admission_due_ = true;
  if (--cluster.live > 0) return;
  for (auto& other : cluster.blocks) std::free(other->shared);
  std::erase_if(grid.clusters, [&](const auto& c) { return c.get() == &cluster; });
  if (grid.blocks_live == 0 && grid.clusters_started == grid.cluster_count) finish_grid(grid);
}

void Scheduler::finish_grid(Grid& grid) {
  grid.finished = true;
  release(&grid.waiting);
  grid.before.reset();
  std::erase_if(grids_, [&](const auto& g) { return g.get() == &grid; });
}

void Scheduler::wait(const char* kind, Where where) {
  current_->waits_at = kind;
  current_->where = where;
  current_->fiber.suspend();
}

void Scheduler::release(std::vector<Thread*>* threads) {
  progress();
  for (Thread* thread : *threads) make_ready(*thread);
  threads->clear();
}

void Scheduler::preemption_point() {
  if (policy_.changes_here()) current_->priority = policy_.draw();
  if (admission_due_ || (!ready_.empty() && ready_.front().first > current_->priority)) {
    make_ready(*current_);
    current_->fiber.suspend();
  }
}

void Scheduler::publish() {
  progress();
  if (policy_.wakes_spinning()) wake_spinning();
  preemption_point();
}

void Scheduler::pause(Where where) {
  spinning_.push_back(current_);
  wait("spin", where);
}

void Scheduler::trigger() {
  Block& block = *current_->block;
  if (block.triggered) return;
  block.triggered = true;
  Grid& grid = *block.cluster->grid;
  if (++grid.blocks_released == grid.block_count()) admission_due_ = true;
  preemption_point();
}

}  // namespace emulator
