#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <source_location>

// What a kernel thread may ask of the emulator; primitives.h gives these the names that kernels use.

namespace emulator {

using Where = std::source_location;

void block_barrier(Where where);

void cluster_arrive(Where where);
void cluster_wait(Where where);
unsigned cluster_rank();
unsigned cluster_size();

// All lanes of the mask meet and see each other's values. Lanes outside of the mask have no value.
std::array<uint64_t, 32> warp_exchange(const char* kind, uint32_t mask, uint64_t value, Where where);
inline constexpr char syncwarp[] = "__syncwarp";  // the kind that orders memory
unsigned lane();
[[noreturn]] void stale_lane(const char* kind, uint32_t mask, unsigned source, Where where);

// A place where another thread may go first.
void preemption_point();
// Memory changed: a spin somewhere may come to its end.
void progress();
// The same of a flag that others wait for; they may look at once.
void publish();
// A flag is read or written in order with what the thread does behind or in front of it.
void acquired(const void* flag);
void released(const void* flag);
void spin_pause(Where where);

void* shared_memory();
size_t shared_bytes();
void* shared_memory_of(const void* own, unsigned rank, Where where);

void grid_dependency_wait(Where where);
void trigger_dependents();

}  // namespace emulator
