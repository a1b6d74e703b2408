#pragma once

#include <utility>

#include "problem.h"

// The ragged cache of append and attend: rows [T, ...] in spans, of each of which the first rows are in use.

namespace lkv::host {

struct Ragged {
  Arrays rows;  // [T, ...], contiguous
  Array cu_seqlens, lengths;
  std::optional<Array> positions;
};

// Raises unless the new rows of `problem` ([B, H, n, ...]), from token `position` on, fit what they are appended to.
// Returns T.
int64_t check_append(const Problem& problem, const Ragged& cache, const Arrays& rows, int64_t position);

// Rows [P, page, ...] in pages of one head each.
struct Paged {
  Arrays pools;
  Array tables, lengths;  // [B, H, M], [B, H]
};

// Raises unless q [B, Hq, n, D] can attend to k, v, `longest` rows of each segment at most, with sinks [Hq]. Pointers
// of the result are those of the arrays; `out` is not set.
AttendParams check_attend(const Array& q, const Ragged& cache, const std::optional<Array>& sinks, int64_t longest);
std::pair<AttendParams, Pages> check_attend_paged(const Array& q, const Paged& cache, const std::optional<Array>& sinks,
                                                  int64_t longest);

}  // namespace lkv::host
