#include "array.h"

namespace lkv::host {

std::string describe(Device device) {
  if (device.kind == Device::cpu) return "cpu";
  return device.kind == Device::cuda ? "cuda:" + std::to_string(device.index) : "another device";
}

std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.text;
  return name.index < 0 ? out : out << '[' << name.index << ']';
}

std::string describe_dtype(const Array& a) {
  switch (a.element) {
    case Element::f32:
      return "float32";
    case Element::f16:
      return "float16";
    case Element::bf16:
      return "bfloat16";
    case Element::i32:
      return "int32";
    case Element::i64:
      return "int64";
    case Element::f64:
      return "float64";
    default:
      return "another of " + std::to_string(a.itemsize) + " bytes";
  }
}

int64_t Array::numel() const {
  int64_t count = 1;
  for (int64_t i = 0; i < rank; ++i) count *= sizes[i];
  return count;
}

bool Array::is_contiguous() const {
  if (numel() == 0) return true;
  int64_t step = itemsize;
  for (int64_t i = rank; i-- > 0; step *= sizes[i])
    if (sizes[i] != 1 && stride(i) != step) return false;
  return true;
}

std::vector<Named> named(const Arrays& arrays, const char* list, bool numbered) {
  std::vector<Named> names;
  names.reserve(arrays.size());
  for (const Array& array : arrays)
    names.push_back({array, {list, numbered ? static_cast<int64_t>(names.size()) : -1}});
  return names;
}

void check_device(const Named& a, Device expected) {
  if (a.array.device == expected) return;
  fail("ValueError", "expected ", a.name, " on ", describe(expected), ", got ", describe(a.array.device));
}

void check_int32(const Named& a, const Shape& expected, const char* dims) {
  if (a.array.element != Element::i32)
    fail("TypeError", "expected ", a.name, " of dtype int32, got ", describe_dtype(a.array));
  const Shape shape = a.array.shape();
  check_value(shape == expected, "expected ", a.name, " of shape ", dims, " = ", expected, ", got ", shape);
  check_value(a.array.is_contiguous(), "expected ", a.name, " contiguous");
}

ScoreType check_scores_dtype(const Named& scores) {
  switch (scores.array.element) {
    case Element::f32:
      return ScoreType::f32;
    case Element::f16:
      return ScoreType::f16;
    case Element::bf16:
      return ScoreType::bf16;
    default:
      fail("TypeError", "expected ", scores.name, " of dtype float32, float16 or bfloat16, got ",
           describe_dtype(scores.array));
  }
}

RowLayout row_layout(const Named& a, int64_t token) {
  const Array& array = a.array;
  RowLayout layout{{array.data, 0, 0, array.stride(token)}, array.itemsize, {}};
  if (token > 0) layout.strided.batch = array.stride(0);
  if (token > 1) layout.strided.head = array.stride(1);
  layout.trailing.assign(array.sizes + token + 1, array.sizes + array.rank);
  bool contiguous = true, fits = true;
  for (int64_t i = array.rank; i-- > token + 1;) {
    contiguous &= array.sizes[i] == 1 || array.stride(i) == layout.row_bytes;
    fits &= !__builtin_mul_overflow(layout.row_bytes, array.sizes[i], &layout.row_bytes);
  }
  check_value(fits, "expected ", a.name, " with rows of fewer bytes than 2**63, got ", array.shape());
  if (!contiguous && array.numel() != 0)
    fail("ValueError", "expected ", a.name, " contiguous after the token axis, got strides ",
         Shape(array.strides, array.strides + array.rank), " for shape ", array.shape());
  return layout;
}

RowInts row_ints(const Named& a, int64_t layers, int64_t batch, int64_t heads) {
  const Array& array = a.array;
  const bool wide = array.element == Element::i64;
  if (!wide && array.element != Element::i32)
    fail("TypeError", "expected ", a.name, " of dtype int32 or int64, got ", describe_dtype(array));
  const int64_t full[3] = {layers, batch, heads};
  int64_t steps[3] = {0, 0, 0};
  bool fits = array.rank <= 3;
  for (int64_t i = 0; fits && i < array.rank; ++i) {
    const int64_t axis = 3 - array.rank + i;
    fits = array.sizes[i] == full[axis] || array.sizes[i] == 1;
    steps[axis] = array.sizes[i] == 1 ? 0 : array.stride(i) / array.itemsize;
  }
  if (!fits)
    fail("ValueError", "expected ", a.name, layers == 1 ? " of shape [H] or [B, H] = " : " of shape [N, B, H] = ",
         layers == 1 ? Shape{batch, heads} : Shape{layers, batch, heads}, ", got ", array.shape());
  return {array.data, steps[0], steps[1], steps[2], 0, wide};
}

}  // namespace lkv::host
