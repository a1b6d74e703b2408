#include "tensors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace lkv::torch_ops {

namespace {

template <class Call>
auto shim(Call call) {
  int32_t value = 0;
  if (call(&value) != 0) throw std::runtime_error("lkv_ext: a torch shim call failed");
  return value;
}

int64_t itemsize(int32_t dtype) { return static_cast<int64_t>(aoti_torch_dtype_element_size(dtype)); }

}  // namespace

DeviceId device_of(const Tensor& t) {
  return {shim([&](int32_t* v) { return aoti_torch_get_device_type(t.get(), v); }),
          shim([&](int32_t* v) { return aoti_torch_get_device_index(t.get(), v); })};
}

std::string describe(DeviceId device) {
  if (device.type == aoti_torch_device_type_cpu()) return "cpu";
  const std::string name =
      device.type == aoti_torch_device_type_cuda() ? "cuda" : "device type " + std::to_string(device.type);
  return name + ":" + std::to_string(device.index);
}

int32_t dtype_of(const Tensor& t) {
  return shim([&](int32_t* v) { return aoti_torch_get_dtype(t.get(), v); });
}

Shape shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Shape(sizes.begin(), sizes.end());
}

Tensor empty(const Shape& shape, int32_t dtype, DeviceId device) {
  Shape strides(shape.size());
  int64_t step = 1;
  for (size_t i = shape.size(); i-- > 0; step *= std::max<int64_t>(shape[i], 1)) strides[i] = step;
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype, device.type,
                               device.index, &handle) != 0) {
    std::ostringstream text;
    text << "MemoryError: cannot allocate a tensor of shape " << shape << " on " << describe(device);
    throw std::runtime_error(text.str());
  }
  return Tensor(handle);
}

Tensor empty_int32(const Shape& shape, DeviceId device) { return empty(shape, aoti_torch_dtype_int32(), device); }

void check_device(const Named& t, DeviceId expected) {
  const DeviceId device = device_of(t.tensor);
  check_value(device == expected, "expected ", t.name, " on ", describe(expected), ", got ", describe(device));
}

void check_int32(const Named& t, const Shape& expected, const char* dims) {
  check_type(dtype_of(t.tensor) == aoti_torch_dtype_int32(), "expected ", t.name, " of dtype int32");
  const Shape shape = shape_of(t.tensor);
  check_value(shape == expected, "expected ", t.name, " of shape ", dims, " = ", expected, ", got ", shape);
  check_value(t.tensor.is_contiguous(), "expected ", t.name, " contiguous");
}

ScoreType check_scores_dtype(const Named& scores) {
  const int32_t dtype = dtype_of(scores.tensor);
  if (dtype == aoti_torch_dtype_float32()) return ScoreType::f32;
  if (dtype == aoti_torch_dtype_bfloat16()) return ScoreType::bf16;
  check_type(dtype == aoti_torch_dtype_float16(), "expected ", scores.name,
             " of dtype float32, float16 or bfloat16, got another");
  return ScoreType::f16;
}

RowLayout row_layout(const Named& t, bool ragged) {
  const auto sizes = t.tensor.sizes();
  const auto strides = t.tensor.strides();
  const size_t token = ragged ? 0 : 2;
  const int64_t element = itemsize(dtype_of(t.tensor));
  RowLayout layout{{static_cast<char*>(t.tensor.data_ptr()), 0, 0, strides[token] * element}, element, {}};
  if (!ragged) {
    layout.strided.batch = strides[0] * element;
    layout.strided.head = strides[1] * element;
  }
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > token + 1; step *= sizes[i]) {
    check_value(sizes[i] == 1 || strides[i] == step, "expected ", t.name,
                " contiguous after the token axis, got strides ", Shape(strides.begin(), strides.end()), " for shape ",
                Shape(sizes.begin(), sizes.end()));
  }
  layout.trailing.assign(sizes.begin() + token + 1, sizes.end());
  layout.row_bytes *= step;
  return layout;
}

RowInts row_ints(const Named& t, int64_t layers, int64_t batch, int64_t heads) {
  const int32_t dtype = dtype_of(t.tensor);
  const bool wide = dtype == aoti_torch_dtype_int64();
  check_type(wide || dtype == aoti_torch_dtype_int32(), "expected ", t.name, " of dtype int32 or int64, got another");
  const int64_t full[3] = {layers, batch, heads};
  const auto sizes = t.tensor.sizes();
  const auto strides = t.tensor.strides();
  const int64_t rank = static_cast<int64_t>(sizes.size());
  int64_t steps[3] = {0, 0, 0};
  bool fits = rank <= 3;
  for (int64_t i = 0; fits && i < rank; ++i) {
    const int64_t axis = 3 - rank + i;
    fits = sizes[i] == full[axis] || sizes[i] == 1;
    steps[axis] = sizes[i] == 1 ? 0 : strides[i];
  }
  check_value(fits, "expected ", t.name, layers == 1 ? " of shape [H] or [B, H] = " : " of shape [N, B, H] = ",
              layers == 1 ? Shape{batch, heads} : Shape{layers, batch, heads}, ", got ", shape_of(t.tensor));
  return {t.tensor.data_ptr(), steps[0], steps[1], steps[2], 0, wide};
}

Extent extent_of(const Tensor& t) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return {nullptr, nullptr};
    last += (sizes[i] - 1) * strides[i];
  }
  const char* begin = static_cast<const char*>(t.data_ptr());
  return {begin, begin + (last + 1) * itemsize(dtype_of(t))};
}

}  // namespace lkv::torch_ops
