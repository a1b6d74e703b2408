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

  const ScoreKernels& kernels() const { return kernels_; }
  int64_t size() const { return size_; }

  // Keys are multiples of 1 << unit_bits(): the lower half of the key of a 16-bit score is 0.
  int unit_bits() const { return type_ == ScoreType::f32 ? 0 : 16; }

  // The keys of 1 << bits scores, of which there are at least as many and bits is at least 8.
  void sample(int bits, uint32_t* keys) const {
    if (type_ == ScoreType::f32) {
      sampled<uint32_t>(bits, keys);
    } else {
      sampled<uint16_t>(bits, keys);
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

  // One score in every stretch of the row, at a pseudo-random place, so that no period of the data matters.
  template <class Item>
  void sampled(int bits, uint32_t* keys) const {
    constexpr int64_t kPiece = 256;
    Item piece[kPiece];
    const auto stretch = static_cast<uint64_t>(size_ >> bits);
    for (int64_t first = 0; first < int64_t{1} << bits; first += kPiece) {
      for (int64_t i = 0; i < kPiece; ++i) {
        uint64_t random = static_cast<uint64_t>(first + i) * 0x9e3779b97f4a7c15u;
        random = (random ^ random >> 31) * 0xbf58476d1ce4e5b9u;
        const int64_t begin = (first + i) * size_ >> bits;
        piece[i] = item<Item>(begin + static_cast<int64_t>((random >> 32) * stretch >> 32));
      }
      kernels_.keys(piece, kPiece, keys + first);
    }
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

  const ScoreKernels& kernels_;
  ScoreType type_;
  const char* data_;
  int64_t stride_, size_;
};

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
