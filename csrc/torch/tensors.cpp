#include "tensors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>

#include "lkv/cpu.h"

namespace lkv::torch_ops {

namespace {

template <class Call>
int32_t shim(Call call) {
  int32_t value = 0;
  if (call(&value) != 0) throw std::runtime_error("RuntimeError: a torch shim call failed");
  return value;
}

int32_t device_type(const Tensor& t) {
  return shim([&](int32_t* v) { return aoti_torch_get_device_type(t.get(), v); });
}

int32_t device_index(const Tensor& t) {
  return shim([&](int32_t* v) { return aoti_torch_get_device_index(t.get(), v); });
}

host::Element element_of(int32_t dtype) {
  using host::Element;
  if (dtype == aoti_torch_dtype_bfloat16()) return Element::bf16;
  if (dtype == aoti_torch_dtype_float16()) return Element::f16;
  if (dtype == aoti_torch_dtype_float32()) return Element::f32;
  if (dtype == aoti_torch_dtype_int32()) return Element::i32;
  if (dtype == aoti_torch_dtype_float64()) return Element::f64;
  return dtype == aoti_torch_dtype_int64() ? Element::i64 : Element::other;
}

host::Device::Kind kind_of(int32_t type) {
  if (type == aoti_torch_device_type_cpu()) return host::Device::cpu;
  return type == aoti_torch_device_type_cuda() ? host::Device::cuda : host::Device::other;
}

}  // namespace

host::Array view(const Tensor& t) {
  const int32_t dtype = shim([&](int32_t* v) { return aoti_torch_get_dtype(t.get(), v); });
  const auto sizes = t.sizes();
  const int64_t itemsize = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
  return {static_cast<char*>(t.data_ptr()),
          sizes.data(),
          t.strides().data(),
          static_cast<int64_t>(sizes.size()),
          itemsize,
          itemsize,
          element_of(dtype),
          dtype,
          {kind_of(device_type(t)), device_index(t)}};
}

std::optional<host::Array> view(const std::optional<Tensor>& t) {
  return t ? std::optional(view(*t)) : std::nullopt;
}

host::Arrays view(const Tensors& list) {
  host::Arrays arrays;
  arrays.reserve(list.size());
  for (const Tensor& t : list) arrays.push_back(view(t));
  return arrays;
}

host::Ints ints(std::optional<std::vector<int64_t>> values, const std::optional<Tensor>& tensor) {
  return {values ? std::move(*values) : std::vector<int64_t>(), view(tensor)};
}

void mark_written(const Tensor& written, const host::Name& name) {
  // The one in-place op of the stable ABI that runs through autograd and, with itself as source, moves nothing.
  host::check_value(aoti_torch_copy_(written.get(), written.get(), 0) == 0, "expected ", name,
                    " that may be written in place, got a leaf that requires a gradient, a view of one, or a tensor "
                    "made in inference mode");
}

void mark_written(const Tensors& written, const char* name) {
  for (size_t i = 0; i < written.size(); ++i) mark_written(written[i], {name, static_cast<int64_t>(i)});
}

Tensor empty(const Shape& shape, int32_t dtype, const Tensor& like) {
  Shape strides(shape.size());
  int64_t step = 1;
  bool fits = true;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = step;
    fits &= !__builtin_mul_overflow(step, std::max<int64_t>(shape[i], 1), &step);
  }
  AtenTensorHandle handle = nullptr;
  if (!fits || aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype,
                                        device_type(like), device_index(like), &handle) != 0)
    host::fail("MemoryError", "cannot allocate a tensor of shape ", shape);
  return Tensor(handle);
}

Tensor empty_output(const Shape& shape, int32_t dtype, const Tensor& like) {
  Tensor out = empty(shape, dtype, like);
  if (kind_of(device_type(like)) == host::Device::cpu) {
    cpu::advise_huge_pages(out.data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  }
  return out;
}

Tensor empty_int32(const Shape& shape, const Tensor& like) {
  return empty(shape, aoti_torch_dtype_int32(), like);
}

Tensor empty_bytes(int64_t count, const Tensor& like) {
  return empty({count}, aoti_torch_dtype_uint8(), like);
}

}  // namespace lkv::torch_ops
