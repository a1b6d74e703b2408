#pragma once

#include <cstdint>

#include "score_row.h"

namespace lkv::cpu {

// What is kept: every key above `key`, and the first `ties` of those equal to it.
struct Pivot {
  uint32_t key;
  int64_t ties;
};

// Scratch of find_pivot in 32-bit words, for rows of up to `longest` scores. Most of it is only touched when scores
// tie or the sample misleads.
int64_t pivot_scratch(int64_t longest);

// The pivot that keeps `rank` of the row, 0 < rank < row.size().
Pivot find_pivot(const RowKernels& kernels, const ScoreRow& row, int64_t rank, uint32_t* scratch);

}  // namespace lkv::cpu
