#pragma once

#include <cstdint>

#include "lkv/keys.h"

// The inner loops, once per instruction set: plain functions over one contiguous piece of one row. What they are told
// is trusted; everything that decides, clamps or splits work is ordinary code compiled once (select.cpp, gather.cpp).

namespace lkv::cpu {

// Vectors are stored whole where that is faster, so key buffers need this many items of slack.
inline constexpr int64_t kSlack = 16;

// A histogram is kCopies interleaved tables, so that runs of equal keys do not wait for one counter.
inline constexpr int kDigitBits = 11;
inline constexpr int kBins = 1 << kDigitBits;
inline constexpr int kCopies = 2;

struct Collected {
  int64_t above, inside;
};

struct Emitted {
  int64_t count, ties;
};

// Over n consecutive items: scores of one type, or keys.
struct KeyKernels {
  int64_t (*count_above)(const void* items, int64_t n, uint32_t key);

  // ++bins[copy * kBins + ((key - low) >> shift)]; every digit must be below kBins.
  void (*histogram)(const void* items, int64_t n, uint32_t low, int shift, uint32_t* bins);

  // Writes the keys in [low, high] to out, in order, and counts those above. `out` may be `items` (of keys).
  Collected (*collect)(const void* items, int64_t n, uint32_t low, uint32_t high, uint32_t* out);

  // Writes position + i for every key above `key` and for the first `ties` keys equal to it. Touches out[0, space) at
  // most, which may be more than it counts.
  Emitted (*emit)(const void* items, int64_t n, uint32_t key, int64_t ties, int64_t position, int32_t* out,
                  int64_t space);
};

// to + i * to_stride = from + positions[i] * from_stride, `bytes` each, in order of i; zeros where the position is
// outside [0, limit). A destination may be a source of later rows, never of earlier ones.
struct RowCopy {
  char* to;
  int64_t to_stride;
  const char* from;
  int64_t from_stride;
  const int32_t* positions;
  int64_t rows, limit, bytes;
};

using CopyRows = void (*)(const RowCopy&);

struct RowKernels {
  const char* name;
  KeyKernels scores[3];  // by ScoreType
  KeyKernels keys;
  CopyRows (*copy_rows)(int64_t bytes);
  CopyRows (*stream_rows)(int64_t bytes);  // non-temporal; rows aligned to 64 bytes at both ends of `to`
  void (*fence)();                         // after the last stream_rows of a tile
};

#if defined(__x86_64__)
extern const RowKernels avx512_kernels;
extern const RowKernels avx2_kernels;
#endif
extern const RowKernels portable_kernels;

// The choice for this process. Throws std::runtime_error if LKV_CPU_ISA names what the machine or the build lacks.
const RowKernels& row_kernels();

}  // namespace lkv::cpu
