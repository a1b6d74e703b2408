#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator/device.h"
#include "lkv/floats.h"

// The twin of csrc/cuda/primitives.cuh: the same names over the emulator. Call sites travel along in default arguments,
// so that a report can name the barrier that a thread waits at.

#define LKV_GRID_CONSTANT __grid_constant__

// What orders memory is never stale (see weak.h).
#define LKV_STRONG __attribute__((no_sanitize("thread")))

namespace lkv::cuda {

template <class T>
T* dyn_smem() {
  static_assert(alignof(T) <= 16);
  return reinterpret_cast<T*>(emulator::shared_memory());
}

inline void block_sync(emulator::Where where = emulator::Where::current()) {
  emulator::block_barrier(where);
}

inline uint32_t cluster_rank() {
  return emulator::cluster_rank();
}
inline uint32_t cluster_size() {
  return emulator::cluster_size();
}

inline void cluster_sync(emulator::Where where = emulator::Where::current()) {
  emulator::cluster_arrive(where);
  emulator::cluster_wait(where);
}

template <class T>
T* map_shared_rank(T* local, uint32_t rank, emulator::Where where = emulator::Where::current()) {
  return reinterpret_cast<T*>(emulator::shared_memory_of(local, rank, where));
}

LKV_STRONG inline uint32_t load_acquire(const uint32_t* flag) {
  emulator::preemption_point();
  emulator::acquired(flag);
  return *flag;
}

template <class T>
LKV_STRONG T load_relaxed(const T* p) {
  emulator::preemption_point();
  return *p;
}

LKV_STRONG inline void store_release(uint32_t* flag, uint32_t value) {
  emulator::preemption_point();
  emulator::released(flag);
  *flag = value;
  emulator::publish();
}

LKV_STRONG inline uint32_t add_acquire_release(uint32_t* counter, uint32_t value) {
  emulator::preemption_point();
  emulator::acquired(counter);
  emulator::released(counter);
  const uint32_t before = *counter;
  *counter += value;
  emulator::publish();
  return before;
}

inline void spin_pause(emulator::Where where = emulator::Where::current()) {
  emulator::spin_pause(where);
}

inline void grid_dependency_wait(emulator::Where where = emulator::Where::current()) {
  emulator::grid_dependency_wait(where);
}

inline void trigger_dependents() {
  emulator::trigger_dependents();
}

template <class T>
T load_once(const T* p) {
  return *p;
}

inline float reciprocal(float x) {
  return 1.0f / x;
}
inline double reciprocal(double x) {
  return x == 0 || std::isinf(x) ? std::nan("") : 1.0 / x;
}
inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}

using lkv::from_float;
using lkv::to_float;

}  // namespace lkv::cuda

namespace emulator {

template <class T>
uint64_t to_word(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}

template <class T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

// `source` is a lane; a shuffle must not look at a lane that is outside of its mask.
template <class T>
T shuffle(const char* kind, uint32_t mask, T value, unsigned source, Where where) {
  const std::array<uint64_t, 32> words = warp_exchange(kind, mask, to_word(value), where);
  if (!(mask >> source & 1)) stale_lane(kind, mask, source, where);
  return from_word<T>(words[source]);
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              emulator::Where where = emulator::Where::current()) {
  const unsigned first = emulator::lane() & ~static_cast<unsigned>(width - 1);
  return emulator::shuffle("__shfl_sync", mask, value, first + (static_cast<unsigned>(source) & (width - 1)), where);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 emulator::Where where = emulator::Where::current()) {
  const unsigned lane = emulator::lane(), place = lane & (width - 1);
  return emulator::shuffle("__shfl_up_sync", mask, value, place < delta ? lane : lane - delta, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Where where = emulator::Where::current()) {
  const std::array<uint64_t, 32> words = emulator::warp_exchange("__ballot_sync", mask, predicate != 0, where);
  unsigned votes = 0;
  for (unsigned i = 0; i < 32; ++i) votes |= (mask >> i & 1) && words[i] ? 1u << i : 0u;
  return votes;
}

inline unsigned __reduce_or_sync(unsigned mask, unsigned value, emulator::Where where = emulator::Where::current()) {
  const std::array<uint64_t, 32> words = emulator::warp_exchange("__reduce_or_sync", mask, value, where);
  unsigned bits = 0;
  for (unsigned i = 0; i < 32; ++i) bits |= mask >> i & 1 ? static_cast<unsigned>(words[i]) : 0u;
  return bits;
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value, emulator::Where where = emulator::Where::current()) {
  const std::array<uint64_t, 32> words = emulator::warp_exchange("__reduce_add_sync", mask, value, where);
  unsigned sum = 0;
  for (unsigned i = 0; i < 32; ++i) sum += mask >> i & 1 ? static_cast<unsigned>(words[i]) : 0u;
  return sum;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, emulator::Where where = emulator::Where::current()) {
  emulator::warp_exchange(emulator::syncwarp, mask, 0, where);
}

inline int __popc(unsigned x) {
  return std::popcount(x);
}
template <class T>
LKV_STRONG T atomicAdd(T* address, std::type_identity_t<T> value) {
  emulator::preemption_point();
  const T before = *address;
  *address = before + value;
  if (value != 0) emulator::progress();
  return before;
}
