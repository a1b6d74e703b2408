#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "lkv/params.h"

// Tensors of torch and arrays of NumPy in one form, and the checks that every op makes of them.

namespace lkv::host {

using Shape = std::vector<int64_t>;

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << '[';
  for (size_t i = 0; i < shape.size(); ++i) out << (i ? ", " : "") << shape[i];
  return out << ']';
}

// Raises. The stable ABI carries every C++ exception to Python as a RuntimeError, so the message begins with the Python
// type that it stands for; lkv_ext raises that type and inserts the public names (its module `errors`).
template <class... Parts>
[[noreturn]] void fail(const char* type, const Parts&... parts) {
  std::ostringstream text;
  text << type << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

template <class... Parts>
void check_value(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    fail("ValueError", parts...);
}

template <class... Parts>
void check_type(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    fail("TypeError", parts...);
}

// The types that ops read as numbers; all others move as bytes.
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

// The name of an array in error messages: "cu_seqlens", "scores[3]". Made a string only where there is an error.
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

// Rows of an array [B, H, L, ...] or, ragged, [T, ...]: everything after the token axis is one row and contiguous. The
// axes before that, if any, are those that `batch` and `head` step over.
struct RowLayout {
  Strided strided;
  int64_t row_bytes;
  Shape trailing;  // the sizes after the token axis
};

RowLayout row_layout(const Named& a, int64_t token_axis);

// An array of integers read once per segment, broadcast (right-aligned) to [layers, batch, heads].
RowInts row_ints(const Named& a, int64_t layers, int64_t batch, int64_t heads);

// True byte overlap of strided arrays: interleaved views of one storage (K | V in one row) do not overlap although
// their extents do. Exact unless the strides are pathological; then the answer is "overlap", the safe one.
bool overlaps_itself(const Array& a);
bool overlap(const Array& a, const Array& b);

// Writing ops: each written array has memory of its own, apart from the other written ones and from what is read.
void check_disjoint(const std::vector<Named>& written, const std::vector<Named>& read);

}  // namespace lkv::host
