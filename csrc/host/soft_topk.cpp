#include "soft_topk.h"

namespace lkv::host {
namespace {

Shape leading_shape(const Array& array) {
  return Shape(array.sizes, array.sizes + array.rank - 1);
}

Number number_of(const Named& a, bool integer) {
  switch (a.array.element) {
    case Element::f32:
      if (!integer) return Number::f32;
      break;
    case Element::f64:
      if (!integer) return Number::f64;
      break;
    case Element::i32:
      if (integer) return Number::i32;
      break;
    case Element::i64:
      if (integer) return Number::i64;
      break;
    default:
      break;
  }
  fail("TypeError", "expected ", a.name, " of dtype ", integer ? "int32 or int64" : "float32 or float64", ", got ",
       describe_dtype(a.array));
}

RowNumbers numbers(const char* name, const PerRow& given, const Named& rows, bool integer) {
  RowNumbers numbers{nullptr, {}, given.value, integer ? Number::i64 : Number::f64};
  if (!given.array) return numbers;
  const Array& array = *given.array;
  check_device({array, name}, rows.array.device);
  numbers.data = array.data;
  numbers.type = number_of({array, name}, integer);
  const int64_t leading = rows.array.rank - 1;
  bool fits = array.rank <= leading;
  for (int64_t i = 0; fits && i < array.rank; ++i) {
    const int64_t of_rows = leading - array.rank + i;
    fits = array.sizes[i] == 1 || array.sizes[i] == rows.array.sizes[of_rows];
    numbers.strides[kLeading - array.rank + i] = array.sizes[i] == 1 ? 0 : array.stride(i) / array.itemsize;
  }
  check_value(fits, "expected ", Name(name), " that broadcasts to the rows of ", rows.name, " ",
              leading_shape(rows.array), ", got ", array.shape());
  return numbers;
}

}  // namespace

SoftRows soft_rows(const Named& a, const PerRow& k, const PerRow& temperature, const std::optional<Array>& lengths) {
  const Array& array = a.array;
  check_value(array.rank >= 1 && array.rank <= kLeading + 1, "expected ", a.name, " of shape [..., n] with at most ",
              kLeading, " axes before n, got ", array.shape());
  SoftRows rows{};
  rows.length = array.sizes[array.rank - 1];
  for (int64_t axis = 0; axis < kLeading; ++axis) {
    const int64_t from = array.rank - 1 - kLeading + axis;
    rows.sizes[axis] = from < 0 ? 1 : array.sizes[from];
  }
  rows.k = numbers("k", k, a, false);
  rows.temperature = numbers("temperature", temperature, a, false);
  rows.lengths = numbers("lengths", {lengths, static_cast<double>(rows.length)}, a, true);
  return rows;
}

SoftTopkParams check_soft_topk(const Array& scores, const PerRow& k, const PerRow& temperature,
                               const std::optional<Array>& lengths, bool log) {
  const Named named{scores, "scores"};
  const bool wide = scores.element == Element::f64;
  if (!wide && scores.element != Element::f32 && scores.element != Element::f16 && scores.element != Element::bf16)
    fail("TypeError", "expected scores of dtype float32, float16, bfloat16 or float64, got ", describe_dtype(scores));
  SoftTopkParams p{};
  p.rows = soft_rows(named, k, temperature, lengths);
  p.rows.wide = wide;
  p.rows.log = log;
  if (!wide) p.rows.type = check_scores_dtype(named);
  p.scores = scores.data;
  for (int64_t axis = 0; axis < kLeading; ++axis) {
    const int64_t from = scores.rank - 1 - kLeading + axis;
    p.strides[axis] = from < 0 ? 0 : scores.stride(from);
  }
  if (p.rows.length > 1 && scores.numel() > 0 && scores.stride(scores.rank - 1) != scores.itemsize)
    fail("ValueError", "expected scores contiguous in the last axis, got strides ",
         Shape(scores.strides, scores.strides + scores.rank), " for shape ", scores.shape());
  return p;
}

}  // namespace lkv::host
