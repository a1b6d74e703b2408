#include "arrays.h"

#include <functional>
#include <memory>
#include <numeric>

namespace lkv::python {

namespace {

static_assert(sizeof(py::ssize_t) == sizeof(int64_t));

host::Element element_of(const py::dtype& dtype) {
  using host::Element;
  if (dtype.byteorder() != '=') return Element::other;
  switch (dtype.kind()) {
    case 'f':
      return dtype.itemsize() == 4 ? Element::f32 : dtype.itemsize() == 2 ? Element::f16 : Element::other;
    case 'i':
      return dtype.itemsize() == 4 ? Element::i32 : dtype.itemsize() == 8 ? Element::i64 : Element::other;
    case 'u':
      return dtype.itemsize() == 2 ? Element::bf16 : Element::other;
    default:
      return Element::other;
  }
}

}  // namespace

host::Array view(const py::array& a) {
  const py::dtype dtype = a.dtype();
  return {const_cast<char*>(static_cast<const char*>(a.data())),
          reinterpret_cast<const int64_t*>(a.shape()),
          reinterpret_cast<const int64_t*>(a.strides()),
          a.ndim(),
          1,
          a.itemsize(),
          element_of(dtype),
          py::hash(dtype),
          {host::Device::cpu, 0}};
}

host::Arrays view(const PyArrays& list) {
  host::Arrays arrays;
  arrays.reserve(list.size());
  for (const py::array& a : list) arrays.push_back(view(a));
  return arrays;
}

host::Array view_writable(const py::array& a, const std::string& name) {
  host::check_value(a.writeable(), "expected ", name, " writeable, got a read-only array");
  return view(a);
}

host::Arrays view_writable(const PyArrays& list, const char* name) {
  host::Arrays arrays;
  arrays.reserve(list.size());
  for (const py::array& a : list)
    arrays.push_back(view_writable(a, std::string(name) + "[" + std::to_string(arrays.size()) + "]"));
  return arrays;
}

py::array empty(const py::dtype& dtype, const host::Shape& shape) {
  constexpr size_t kLine = 64;
  const size_t bytes =
      std::accumulate(shape.begin(), shape.end(), static_cast<size_t>(dtype.itemsize()), std::multiplies<>());
  const py::array_t<char> memory(static_cast<py::ssize_t>(bytes + kLine));
  void* data = const_cast<char*>(memory.data());
  size_t space = bytes + kLine;
  return py::array(dtype, shape, std::align(kLine, bytes, data, space), memory);
}

}  // namespace lkv::python
