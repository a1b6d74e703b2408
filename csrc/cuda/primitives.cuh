#pragma once

// The device primitives that are not plain C++. Kernels use nothing else but these, threadIdx, blockIdx, blockDim and
// gridDim, __shfl_sync, __shfl_up_sync, __reduce_or_sync, __reduce_add_sync, __ballot_sync, __popc, __syncwarp,
// atomicAdd on uint32_t, rsqrtf, and what <cmath> has under the same name, so that the sources also compile against the
// emulator. Guards of what an architecture has live in here: before sm_90 a cluster is one block, and dependent
// launches do not exist.

#if defined(LKV_EMULATOR)
#include "emulator/primitives.h"
#else

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "lkv/keys.h"

#define LKV_GRID_CONSTANT __grid_constant__

namespace lkv::cuda {

// The block's dynamic shared memory, 16-byte aligned. Kernels have no other shared memory.
template <class T>
__device__ __forceinline__ T* dyn_smem() {
  static_assert(alignof(T) <= 16);
  extern __shared__ __align__(16) unsigned char lkv_dynamic_shared[];
  return reinterpret_cast<T*>(lkv_dynamic_shared);
}

__device__ __forceinline__ void block_sync() {
  __syncthreads();
}

__device__ __forceinline__ uint32_t cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

__device__ __forceinline__ uint32_t cluster_size() {
#if __CUDA_ARCH__ >= 900
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}

// Barrier over all threads of the cluster that also orders their shared, distributed shared and global accesses.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The same object in the shared memory of block `rank` of this cluster.
template <class T>
__device__ __forceinline__ T* map_shared_rank(T* local, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  T* peer;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(peer) : "l"(local), "r"(rank));
  return peer;
#else
  return local;
#endif
}

// Flags in global memory, at gpu scope.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

// What the grids in front have written, read before this one has waited for them or acquired it: not out of an L1
// cache, which may hold what was there before. Of 4 or 8 bytes; host code never runs it.
template <class T>
LKV_HD T load_relaxed(const T* p) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
#if defined(__CUDA_ARCH__)
  T value;
  if constexpr (sizeof(T) == 4) {
    uint32_t word;
    asm volatile("ld.relaxed.gpu.u32 %0, [%1];" : "=r"(word) : "l"(p));
    memcpy(&value, &word, sizeof value);
  } else {
    uint64_t word;
    asm volatile("ld.relaxed.gpu.u64 %0, [%1];" : "=l"(word) : "l"(p));
    memcpy(&value, &word, sizeof value);
  }
  return value;
#else
  return *p;
#endif
}

__device__ __forceinline__ void store_release(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t add_acquire_release(uint32_t* counter, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}

// One step of a spin on a flag.
__device__ __forceinline__ void spin_pause() {
  __nanosleep(64);
}

// Waits for the grids this one was launched behind to be complete and visible (all of them, at once if none).
__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// This block no longer delays a grid launched behind this one; what it wrote need not be visible to that grid.
__device__ __forceinline__ void trigger_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A load of what no thread writes during the grid and none reads again: uint4, uint2 or an unsigned integer.
template <class T>
__device__ __forceinline__ T load_once(const T* p) {
  return __ldcs(p);
}

// Within one unit in the last place; 0 where that is not a normal number.
__device__ __forceinline__ float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// In double without the call that a division is; NaN of 0 and of infinity.
__device__ __forceinline__ double reciprocal(double x) {
  double result;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(result) : "d"(x));
  result = fma(fma(-x, result, 1.0), result, result);
  return fma(fma(-x, result, 1.0), result, result);
}

// Scores' types as float32 and back, by their bits; to 16 bits rounds to nearest, ties to even.
template <ScoreType type>
__device__ __forceinline__ float to_float(typename ScoreTraits<type>::Bits bits) {
  if constexpr (type == ScoreType::f32) {
    return __uint_as_float(bits);
  } else if constexpr (type == ScoreType::bf16) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  } else {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }
}

template <ScoreType type>
__device__ __forceinline__ typename ScoreTraits<type>::Bits from_float(float value) {
  if constexpr (type == ScoreType::f32) {
    return __float_as_uint(value);
  } else {
    uint16_t bits;
    if constexpr (type == ScoreType::bf16) {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    } else {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    }
    return bits;
  }
}

}  // namespace lkv::cuda

#endif
