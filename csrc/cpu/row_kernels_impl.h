#pragma once

#include <cstring>

#include "attend_kernels_impl.h"
#include "key_kernels_impl.h"
#include "soft_topk_kernels_impl.h"

// The table of row kernels over a vector type S, and its row copies. Included by one file per instruction set; internal
// linkage as in key_kernels_impl.h.
//
// S: what the other kernels need, and blocks of `block` bytes (a divisor of 64): copy_block, stream_block
// (non-temporal, both to aligned memory), fence.

namespace lkv::cpu {
namespace {

// Enough rows ahead to hide memory's latency, few enough to stay in the first-level cache.
constexpr int64_t kPrefetchBytes = 4096;

template <class S, bool streaming>
void move_block(char* to, const char* from) {
  if constexpr (streaming) {
    S::stream_block(to, from);
  } else {
    S::copy_block(to, from);
  }
}

// Rows of a size known at compile time.
template <class S, int64_t size, bool streaming>
struct Fixed {
  static void copy(char* to, const char* from, int64_t) {
    if constexpr (size % S::block == 0) {
      for (int64_t at = 0; at < size; at += S::block) move_block<S, streaming>(to + at, from + at);
    } else {
      memcpy(to, from, size);
    }
  }
};

// Rows of `half` to 2 * half bytes: two copies that may overlap.
template <int64_t half>
struct Halves {
  static void copy(char* to, const char* from, int64_t bytes) {
    char first[half], last[half];
    memcpy(first, from, half);
    memcpy(last, from + bytes - half, half);
    memcpy(to, first, half);
    memcpy(to + bytes - half, last, half);
  }
};

// Rows of a block or more; the last block may overlap the one before it.
template <class S, bool streaming>
struct Blocks {
  static void copy(char* to, const char* from, int64_t bytes) {
    int64_t at = 0;
    for (; at + S::block <= bytes; at += S::block) move_block<S, streaming>(to + at, from + at);
    if (at < bytes) S::copy_block(to + bytes - S::block, from + bytes - S::block);
  }
};

// The first line alone: it loads the address translation, and the hardware prefetches the lines beside it, where one
// request for each line would delay those of the copies. The address of a position that may be anything is computed
// as an integer and only ever prefetched.
inline void prefetch_row(const char* rows, int64_t position, int64_t stride) {
  const uintptr_t row =
      reinterpret_cast<uintptr_t>(rows) + static_cast<uintptr_t>(position) * static_cast<uintptr_t>(stride);
  __builtin_prefetch(reinterpret_cast<const void*>(row));
}

inline int64_t rows_ahead(int64_t bytes, int64_t rows) {
  int64_t ahead = kPrefetchBytes / bytes;
  if (ahead < 1) ahead = 1;
  if (ahead > 32) ahead = 32;
  return ahead > rows ? rows : ahead;
}

template <class Row>
struct CopyEach {
  static void run(const RowCopy& c) {
    const int64_t ahead = rows_ahead(c.bytes, c.rows);
    for (int64_t i = 0; i < ahead; ++i) prefetch_row(c.from, c.positions[i], c.from_stride);
    char* to = c.to;
    for (int64_t i = 0; i < c.rows; ++i, to += c.bytes) {
      if (i + ahead < c.rows) prefetch_row(c.from, c.positions[i + ahead], c.from_stride);
      const int64_t position = c.positions[i];
      if (position >= 0 && position < c.limit) {
        Row::copy(to, c.from + position * c.from_stride, c.bytes);
      } else {
        memset(to, 0, static_cast<size_t>(c.bytes));
      }
    }
  }
};

template <class Row>
struct MoveEach {
  static void run(const RowMove& m) {
    const int64_t ahead = rows_ahead(m.bytes, m.rows);
    for (int64_t i = 0; i < ahead; ++i) __builtin_prefetch(m.from[i]);
    for (int64_t i = 0; i < m.rows; ++i) {
      if (i + ahead < m.rows) __builtin_prefetch(m.from[i + ahead]);
      Row::copy(m.to[i], m.from[i], m.bytes);
    }
  }
};

// The loop over rows of this size.
template <template <class> class Loop, class S, bool streaming>
auto pick_large(int64_t bytes) {
  switch (bytes) {
    case 64:
      return Loop<Fixed<S, 64, streaming>>::run;
    case 128:
      return Loop<Fixed<S, 128, streaming>>::run;
    case 256:
      return Loop<Fixed<S, 256, streaming>>::run;
    case 512:
      return Loop<Fixed<S, 512, streaming>>::run;
    default:
      return Loop<Blocks<S, streaming>>::run;
  }
}

template <template <class> class Loop, class S>
auto pick(int64_t bytes) {
  switch (bytes) {
    case 1:
      return Loop<Fixed<S, 1, false>>::run;
    case 2:
      return Loop<Fixed<S, 2, false>>::run;
    case 4:
      return Loop<Fixed<S, 4, false>>::run;
    case 8:
      return Loop<Fixed<S, 8, false>>::run;
    case 16:
      return Loop<Fixed<S, 16, false>>::run;
    case 32:
      return Loop<Fixed<S, 32, false>>::run;
  }
  if (bytes < 4) return Loop<Halves<2>>::run;
  if (bytes < 8) return Loop<Halves<4>>::run;
  if (bytes < 16) return Loop<Halves<8>>::run;
  if (bytes < 32) return Loop<Halves<16>>::run;
  if (bytes < 64) return Loop<Halves<32>>::run;
  return pick_large<Loop, S, false>(bytes);
}

template <class S>
constexpr RowKernels make_row_kernels(const char* name) {
  return {
      name,
      {score_kernels<S, ScoreType::f32>(), score_kernels<S, ScoreType::f16>(), score_kernels<S, ScoreType::bf16>()},
      key_kernels<S>(),
      pick<CopyEach, S>,
      pick_large<CopyEach, S, true>,
      pick<MoveEach, S>,
      pick_large<MoveEach, S, true>,
      S::fence,
      Attend<S>::run,
      {soft_kernels<S, ScoreType::f32>(), soft_kernels<S, ScoreType::f16>(), soft_kernels<S, ScoreType::bf16>()},
  };
}

}  // namespace
}  // namespace lkv::cpu
