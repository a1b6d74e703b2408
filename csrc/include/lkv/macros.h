#pragma once

// LKV_HD marks what host code, CUDA kernels and the emulator share.
#if defined(__CUDACC__)
#define LKV_HD __host__ __device__ __forceinline__
#else
#define LKV_HD inline
#endif
