#pragma once

#include "problem.h"

// From a problem to the arguments of the kernels.

namespace lkv::host {

// What select writes; `overflow` is nullptr unless it is counted.
struct IndexPointers {
  int32_t *positions, *lengths, *cu_seqlens, *overflow;
};

// `tables`: where the tables of the problem lie for the kernel. `ready`: see SelectParams; may be nullptr.
class Params {
 public:
  Params(const Problem& problem, const char* tables) : problem_(problem), tables_(tables) {}

  SpansParams spans(const Sizes& sizes, const IndexPointers& out, uint32_t* ready) const;
  SelectParams select(const Sizes& sizes, const IndexPointers& out, uint32_t* ready) const;
  // `outputs`: offset in the tables of the pointers to where the payload goes.
  GatherParams gather(size_t outputs, const int32_t* positions, const int32_t* cu_seqlens, int64_t total,
                      const uint32_t* ready, bool warm) const;
  // `filled`: where positions go if rows move in any order.
  CompactParams compact(const Sizes& sizes, const IndexPointers& index, int32_t* filled) const;
  // `outputs`: as in gather. What it writes is the caller's to fill in.
  AppendParams append(size_t outputs, const IntTable& valid) const;

 private:
  template <class T>
  T* table(size_t offset) const {
    return reinterpret_cast<T*>(const_cast<char*>(tables_) + offset);
  }
  Source source() const;

  const Problem& problem_;
  const char* tables_;
};

}  // namespace lkv::host
