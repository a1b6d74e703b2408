#pragma once

#include "problem.h"

// Where an op writes when the memory is the caller's.

namespace lkv::host {

struct Outputs {
  Arrays moved;  // one per payload
  Array positions, lengths, cu_seqlens;
  std::optional<Array> overflow;  // where it is counted
};

// Raises unless every output has the shape and dtype of what goes there, and memory of its own.
void check_outputs(const Problem& problem, const Sizes& sizes, const Outputs& out, const Arrays& payload,
                   const Arrays& scores);

// The same of a payload that is rewritten in place.
void check_in_place(const Problem& problem, const Sizes& sizes, const Arrays& payload, const Arrays& scores);

}  // namespace lkv::host
