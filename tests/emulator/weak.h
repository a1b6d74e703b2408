#pragma once

#include <cstddef>
#include <cstdint>

// Old values of plain loads, in a build that instruments the kernels (LKV_EMULATOR_WEAK); elsewhere they are never old.
// Every thread knows all that other grids wrote before a time: the beginning of its grid, or a wait or an acquire
// since, its own or that of a thread that it has met at a barrier.

namespace emulator::weak {

// Device memory whose stores are remembered. All of it is given back before any is used again.
void* allocate(size_t bytes);
void free();

void seed(uint64_t seed);
uint32_t tick();
// Memory has the value that was written last.
void settle();

void acquire(const void* flag);
void release(const void* flag);
void wait_for_all();

}  // namespace emulator::weak
