#pragma once

#include <string>

#include "checks.h"
#include "lkv/params.h"

// A tensor of torch or an array of NumPy, as the checks see it, and what they ask of one. Nothing here is specific to
// an op.

namespace lkv::host {

// What an op reads as numbers; all else moves as bytes.
enum class Element : int32_t { other, f32, f16, bf16, i32, i64, f64 };

struct Device {
  enum Kind : int32_t { cpu, cuda, other } kind;
  int32_t index;
  bool operator==(const Device&) const = default;
};

std::string describe(Device device);

// Borrows its sizes and strides from the owner of the memory.
struct Array {
  char* data;
  const int64_t *sizes, *strides;
  int64_t rank;
  int64_t stride_unit;  // bytes: torch counts strides in elements, NumPy in bytes
  int64_t itemsize;
  Element element;
  int64_t dtype;  // equal where the dtypes of two arrays are
  Device device;

  int64_t stride(int64_t axis) const { return strides[axis] * stride_unit; }
  int64_t numel() const;
  Shape shape() const { return Shape(sizes, sizes + rank); }
  bool is_contiguous() const;
};

std::string describe_dtype(const Array& a);

using Arrays = std::vector<Array>;

// How error messages call an array: "cu_seqlens", "scores[3]". Spelled out only where there is an error.
struct Name {
  const char* text;
  int64_t index = -1;

  Name(const char* text, int64_t index = -1) : text(text), index(index) {}
};

std::ostream& operator<<(std::ostream& out, const Name& name);

struct Named {
  const Array& array;
  Name name;
};

std::vector<Named> named(const Arrays& arrays, const char* list, bool numbered = true);

void check_device(const Named& a, Device expected);
void check_int32(const Named& a, const Shape& expected, const char* dims);
ScoreType check_scores_dtype(const Named& scores);

// Rows of an array [B, H, L, ...] or, ragged, [T, ...]: everything after the token axis is one row and contiguous.
struct RowLayout {
  Strided strided;
  int64_t row_bytes;
  Shape trailing;  // the sizes after the token axis
};

RowLayout row_layout(const Named& a, bool ragged);

// An array of integers read once per segment, broadcast (right-aligned) to [layers, batch, heads].
RowInts row_ints(const Named& a, int64_t layers, int64_t batch, int64_t heads);

}  // namespace lkv::host
