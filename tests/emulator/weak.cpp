#include "weak.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <unordered_map>
#include <vector>

#include "scheduler.h"

// What plain loads may return on a device: a grid that has neither waited for another one nor acquired what that has
// released may read what was there before. Kernels built with -fsanitize=thread call the hooks below in front of every
// load and store; no run time of that sanitizer is linked. A load that may be stale finds the old bytes in memory, and
// the next hook or primitive puts the new ones back.

namespace emulator::weak {
namespace {

constexpr size_t arena_bytes = size_t{256} << 20;

// One byte of the arena.
struct Written {
  uint32_t time, grid;   // of the last plain store; time 0: none
  unsigned char before;  // its value before that grid stored to it
};

struct Patch {
  unsigned char* at;
  unsigned char value;
};

uint32_t now = 1;
size_t taken = 0, live = 0;
std::vector<Patch> patches;
std::unordered_map<const void*, uint32_t> releases;
Random random_;

void* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return memory;
}

unsigned char* const arena = static_cast<unsigned char*>(reserve(arena_bytes));
Written* const history = static_cast<Written*>(reserve(arena_bytes * sizeof(Written)));

void learn(uint32_t time) {
  uint32_t& known = Scheduler::instance().current().known;
  if (time > known) known = time;
}

const Grid* running_grid() {
  Scheduler& scheduler = Scheduler::instance();
  return scheduler.runs() ? scheduler.current().block->cluster->grid : nullptr;
}

void on_load(void* address, size_t bytes) {
  const size_t offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(arena);
  if (offset >= arena_bytes) return;
  const Grid* grid = running_grid();
  if (grid == nullptr) return;
  settle();
  const uint32_t known = Scheduler::instance().current().known;
  bool chosen = false, old = false;
  for (size_t i = offset; i < offset + bytes; ++i) {
    const Written& written = history[i];
    if (written.time < known || written.time == 0 || written.grid == grid->ordinal) continue;
    if (!chosen) old = random_.next() % 4 != 0;
    chosen = true;
    if (!old) return;
    patches.push_back({arena + i, arena[i]});
    arena[i] = written.before;
  }
}

void on_store(void* address, size_t bytes) {
  const size_t offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(arena);
  if (offset >= arena_bytes) return;
  const Grid* grid = running_grid();
  if (grid == nullptr) return;
  settle();
  for (size_t i = offset; i < offset + bytes; ++i) {
    Written& written = history[i];
    if (written.time == 0 || written.grid != grid->ordinal) written.before = arena[i];
    written.time = now;
    written.grid = grid->ordinal;
  }
}

}  // namespace

void* allocate(size_t bytes) {
  constexpr size_t alignment = 256;
  const size_t end = taken + (bytes + alignment - 1) / alignment * alignment;
  if (end > arena_bytes) return nullptr;
  void* data = arena + taken;
  taken = end;
  ++live;
  return data;
}

void free() {
  if (--live == 0) taken = 0;
}

void seed(uint64_t seed) {
  random_ = Random(seed);
}

uint32_t tick() {
  return ++now;
}

void settle() {
  for (const Patch& patch : patches) *patch.at = patch.value;
  patches.clear();
}

void acquire(const void* flag) {
  const auto found = releases.find(flag);
  if (found != releases.end()) learn(found->second);
}

void release(const void* flag) {
  releases[flag] = tick();
}

void wait_for_all() {
  learn(tick());
}

}  // namespace emulator::weak

using emulator::weak::on_load;
using emulator::weak::on_store;

extern "C" {

void __tsan_init() {}

#define LKV_HOOKS(bytes)                        \
  void __tsan_read##bytes(void* p) {            \
    on_load(p, bytes);                          \
  }                                             \
  void __tsan_write##bytes(void* p) {           \
    on_store(p, bytes);                         \
  }                                             \
  void __tsan_unaligned_read##bytes(void* p) {  \
    on_load(p, bytes);                          \
  }                                             \
  void __tsan_unaligned_write##bytes(void* p) { \
    on_store(p, bytes);                         \
  }
LKV_HOOKS(1)
LKV_HOOKS(2)
LKV_HOOKS(4)
LKV_HOOKS(8)
LKV_HOOKS(16)

void __tsan_read_range(void* p, size_t bytes) {
  on_load(p, bytes);
}
void __tsan_write_range(void* p, size_t bytes) {
  on_store(p, bytes);
}
void __tsan_vptr_update(void*, void*) {}
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) {  // the guard of a static variable
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
