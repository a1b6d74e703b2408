#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "row_kernels.h"

namespace lkv::cpu {

// The scores of one row that compete, at any stride. The kernels see contiguous pieces: the row itself, or copies of a
// piece at a time on the stack.
class ScoreRow {
 public:
  ScoreRow(const RowKernels& kernels, ScoreType type, const char* data, int64_t stride, int64_t size)
      : kernels_(kernels.scores[static_cast<int>(type)]), type_(type), data_(data), stride_(stride), size_(size) {}

  const KeyKernels& kernels() const { return kernels_; }
  int64_t size() const { return size_; }

  // Keys are multiples of 1 << unit_bits() (below the top half there is nothing in a 16-bit score).
  int unit_bits() const { return type_ == ScoreType::f32 ? 0 : 16; }

  uint32_t key(int64_t i) const {
    switch (type_) {
      case ScoreType::f32:
        return ordered_key<ScoreType::f32>(item<uint32_t>(i));
      case ScoreType::f16:
        return ordered_key<ScoreType::f16>(item<uint16_t>(i));
      default:
        return ordered_key<ScoreType::bf16>(item<uint16_t>(i));
    }
  }

  // visit(items, count, first): pieces in order of position.
  template <class Visit>
  void for_each_piece(Visit&& visit) const {
    if (type_ == ScoreType::f32) {
      pieces<uint32_t>(visit);
    } else {
      pieces<uint16_t>(visit);
    }
  }

 private:
  template <class Item>
  Item item(int64_t i) const {
    Item item;
    std::memcpy(&item, data_ + i * stride_, sizeof(item));
    return item;
  }

  template <class Item, class Visit>
  void pieces(Visit& visit) const {
    if (stride_ == sizeof(Item)) return visit(static_cast<const void*>(data_), size_, int64_t{0});
    constexpr int64_t kPiece = 1024;
    Item piece[kPiece];
    for (int64_t first = 0; first < size_; first += kPiece) {
      const int64_t count = std::min(kPiece, size_ - first);
      for (int64_t i = 0; i < count; ++i) piece[i] = item<Item>(first + i);
      visit(static_cast<const void*>(piece), count, first);
    }
  }

  const KeyKernels& kernels_;
  ScoreType type_;
  const char* data_;
  int64_t stride_, size_;
};

}  // namespace lkv::cpu
