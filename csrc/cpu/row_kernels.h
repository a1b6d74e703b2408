#pragma once

#include <cstdint>

#include "lkv/keys.h"
#include "lkv/soft_threshold.h"

// The inner loops, once per instruction set: plain functions over one contiguous piece of one row. They trust
// their arguments; everything that decides, clamps or splits work is ordinary code compiled once (select.cpp,
// gather.cpp).

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

// ++bins[copy * kBins + ((key - low) >> shift)] for n items; every digit must be below kBins.
using Histogram = void (*)(const void* items, int64_t n, uint32_t low, int shift, uint32_t* bins);

// Writes the keys in [low, high], which are not all there are, to out, in order, and counts those above. `out` may be
// `items` (of keys).
using Collect = Collected (*)(const void* items, int64_t n, uint32_t low, uint32_t high, uint32_t* out);

// Over n consecutive keys.
struct KeyKernels {
  int64_t (*count_above)(const void* items, int64_t n, uint32_t key);
  Histogram histogram;
  Collect collect;
};

// Over n consecutive scores of one type.
struct ScoreKernels {
  void (*keys)(const void* items, int64_t n, uint32_t* out);  // writes whole vectors
  Histogram histogram;
  Collect collect;

  // Writes position + i for every key above `key` and for the first `ties` keys equal to it. Touches out[0, space) at
  // most, which may be more than it counts.
  Emitted (*emit)(const void* items, int64_t n, uint32_t key, int64_t ties, int64_t position, int32_t* out,
                  int64_t space);
};

// to + i * bytes = from + positions[i] * from_stride, `bytes` each; zeros where the position is outside [0, limit).
struct RowCopy {
  char* to;
  const char* from;
  int64_t from_stride;
  const int32_t* positions;
  int64_t rows, limit, bytes;
};

using CopyRows = void (*)(const RowCopy&);

// In place: the row at from[i] moves to to[i], in order of i. What is overwritten may have moved, and is never still to
// move.
struct RowMove {
  const char* const* from;
  char* const* to;
  int64_t rows, bytes;
};

using MoveRows = void (*)(const RowMove&);

// Rows that are attended to at a time: their keys and values stay in the first-level cache for all queries.
inline constexpr int64_t kAttendRows = 64;

// Queries of one KV head over `rows` consecutive rows. Running softmax: acc and sum are those of e^(logit - highest).
struct AttendTile {
  const float* queries;  // [count, query_stride], scaled; zeros behind dim
  int64_t count, query_stride;
  const int64_t* visible;  // [count] how many of the rows, from the first, each query sees; may be negative
  ScoreType k_type, v_type;
  const char *k, *v;
  int64_t k_stride, v_stride;  // bytes
  int64_t rows, dim, dim_v;
  float softcap;
  float *highest, *sum;  // in and out [count]
  float* acc;            // in and out [count, acc_stride]
  int64_t acc_stride;    // a multiple of kAttendStep, at least dim_v
};

// Strides of queries and acc are multiples of this many floats, so that vectors may be read and written whole.
inline constexpr int64_t kAttendStep = 64;

using AttendRows = void (*)(const AttendTile&);

// A pass over n consecutive scores at one tau. `out`: where the mask goes, or its logarithm; nullptr: nowhere.
struct SoftPass {
  const void* scores;
  int64_t n;
  double tau, temperature;
  void* out;
  bool log;
  bool rough = false;  // sums within a thousandth do, of scores that are all finite; nothing is written
};

// From n gradients of the mask, or of its logarithm, to those of the scores: (a - w * mean) / temperature, where a is
// the gradient times m (1 - m), or 1 - m, and w = m (1 - m).
struct SoftGrad {
  const void *mask, *grad;
  int64_t n;
  bool log;
  double mean, temperature;
  void* out;
};

// The sums of a, a u and w u, with u = (score - tau) / temperature.
struct SoftGradSums {
  double a, au, wu;
};

// Sums are in double over stretches that are summed in the type of the mask.
struct SoftKernels {
  SoftRange (*range)(const void* scores, int64_t n);
  SoftSums (*pass)(const SoftPass&);
  SoftGradSums (*sum_grad)(const SoftGrad&, bool with_u);
  void (*write_grad)(const SoftGrad&);
  void (*nudge)(void* mask, int64_t n, double move);  // tau by a little: `move` temperatures, to second order
};

struct RowKernels {
  const char* name;
  ScoreKernels scores[3];  // by ScoreType
  KeyKernels keys;
  CopyRows (*copy_rows)(int64_t bytes);
  CopyRows (*stream_rows)(int64_t bytes);  // non-temporal; rows aligned to 64 bytes at both ends of `to`
  MoveRows (*move_rows)(int64_t bytes);
  MoveRows (*stream_moves)(int64_t bytes);  // non-temporal, as stream_rows
  void (*fence)();                          // after the last non-temporal stores of a unit of work
  AttendRows attend;
  SoftKernels soft[3];  // by ScoreType
};

extern const SoftKernels soft_double_kernels;

#if defined(__x86_64__)
extern const RowKernels avx512_kernels;
extern const RowKernels avx2_kernels;
#endif
extern const RowKernels portable_kernels;

// The choice for this process. Throws std::runtime_error if LKV_CPU_ISA names what the machine or the build lacks.
const RowKernels& row_kernels();

}  // namespace lkv::cpu
