#pragma once

#include <algorithm>
#include <optional>

#include "array.h"

// The arguments that the ops share, checked once and laid out as tables that both the CPU and the CUDA kernels read.

namespace lkv::host {

// Rows, positions and segments are counted in int32.
inline constexpr int64_t kMost = INT32_MAX;

// Integers of the caller: on the host, in an array, or both (then the host copy has sized the output already).
struct Ints {
  std::vector<int64_t> host;
  std::optional<Array> array;
};

// Which segments there are. batch and heads are read from the arrays when these are dense.
struct Layout {
  int64_t layers, batch, heads;
  std::optional<Array> cu_seqlens;  // of ragged input
};

// What every segment keeps and how the output is cut into spans; see SpansParams and SelectParams.
struct Sizes {
  Ints budgets, lengths, starts;
  int64_t sink, window;
  int64_t total, padded;  // rows of the output; C of a padded one, negative when packed
  int64_t max_budget;     // negative: none
  int64_t reserve, align;
  int64_t back;    // 0, or kept rows move to the back, and what is dropped is a multiple of so many rows
  bool any_order;  // in place: rows that lie where kept rows go stay there
};

// Tables of one launch, built on the host and placed where the kernel runs. An entry is known by its offset until then.
class Tables {
 public:
  Tables() { bytes_.reserve(512); }  // enough for a single layer

  template <class T>
  size_t add(const T* values, size_t count) {
    const size_t offset = bytes_.size();
    bytes_.resize((offset + count * sizeof(T) + 15) / 16 * 16);
    std::copy_n(reinterpret_cast<const char*>(values), count * sizeof(T), bytes_.data() + offset);
    return offset;
  }
  template <class T>
  size_t add(const std::vector<T>& values) {
    return add(values.data(), values.size());
  }
  const char* data() const { return bytes_.data(); }
  size_t size() const { return bytes_.size(); }

 private:
  std::vector<char> bytes_;
};

// RowInts whose host values, if any, lie in the tables.
struct IntTable {
  RowInts ints;
  std::optional<size_t> offset;

  RowInts at(const char* tables) const {
    RowInts placed = ints;
    if (offset) placed.data = tables + *offset;
    return placed;
  }
};

struct Payload {
  Shape trailing;
  int64_t dtype, itemsize, row_bytes;
};

// Payload-major: tensor p of layer n is payload[p * layers + n]. Either list may be empty; the first tensor of the
// first one that is not gives device and shape to all the others.
class Problem {
 public:
  Problem(const Arrays& payload, const Arrays& scores, const Layout& layout);
  void read_sizes(const Sizes& sizes);
  // The payload of a problem that was made of scores alone: pools [P, H, page, ...], or [P, page, ...] where every head
  // has a table of its own, and tables [B, M], or [B, H, M], of page ids for all layers. The last tables.size() - 1
  // kinds of pools have a table each, all others the first one.
  void read_pages(const Arrays& pools, const Arrays& ids);
  // Pages::free of all tables, one after the other: how many elements there are, and where they go.
  int64_t free_counts() const;
  void count_free_pages(int32_t* free);
  // `per_head`: the short form is one value per head, otherwise one per sequence. `fallback`: where there is no value.
  IntTable read_ints(const Ints& values, const char* name, const char* shapes, bool per_head, int64_t fallback);
  // Checks an index that select made for these segments; returns the C of its spans, negative when packed.
  int64_t check_index(const Array& positions, const Array& cu_seqlens) const;

  int64_t rows() const { return layers * batch * heads; }
  Shape lengths_shape() const;                                                     // [B, H], with layers [N, B, H]
  Shape output_shape(int64_t total, int64_t padded, const Shape& trailing) const;  // [T', ...] or [B, H, C, ...]

  Device device;
  int64_t layers, batch, heads;
  int64_t longest = 0;                  // bounds the length of every segment
  std::optional<Array> offsets;         // cu_seqlens of ragged input
  const int32_t* cu_seqlens = nullptr;  // their data
  ScoreType score_type = ScoreType::f32;
  std::vector<Payload> payloads;
  Tables tables;
  std::vector<Pages> pages;  // of each payload
  size_t own_tables = 0;     // how many of them, the last ones, do not share the table of the first
  size_t tokens, scores, inputs, row_bytes, pages_table;  // offsets in the tables
  IntTable budgets{}, lengths{}, starts{};

 private:
  // Whether pages[kind] is the first with its table.
  bool counts_pages(size_t kind) const { return kind == 0 || kind + own_tables >= pages.size(); }
  void read_shape(const Named& first);
  void check_rows() const;
  std::vector<Strided> read_rows(const Arrays& list, const char* name, std::vector<int64_t>& tokens);
};

// The table of a pool [P, H, page, ...], or [P, page, ...] where every head has a table of its own.
Pages read_table(const Named& pool, const Named& table, int64_t batch, int64_t heads, Device device);

// The first table is that of all pools that have none of their own.
inline Name table_name(size_t i) {
  return i == 0 ? Name("tables") : Name("companion_tables", static_cast<int64_t>(i) - 1);
}

// Where an op writes when the memory is the caller's.
struct Outputs {
  Arrays moved;  // one per payload
  Array positions, lengths, cu_seqlens;
  std::optional<Array> overflow;  // where it is counted
};

// Raises unless every output has the shape and dtype of what goes there, and memory of its own.
void check_outputs(const Problem& problem, const Sizes& sizes, const Outputs& out, const Arrays& payload,
                   const Arrays& scores);

// The same of a payload that is rewritten in place, and of pools.
void check_in_place(const Problem& problem, const Sizes& sizes, const Arrays& payload, const Arrays& scores);
void check_in_pages(const Problem& problem, const Sizes& sizes, const Arrays& pools, const Arrays& tables,
                    const Arrays& scores);

}  // namespace lkv::host
