#pragma once

#include <pybind11/numpy.h>

#include "host/array.h"

// NumPy's arrays as csrc/host checks them.

namespace lkv::python {

namespace py = pybind11;
using PyArrays = std::vector<py::array>;

// Borrows from the array. uint16 counts as bfloat16, which NumPy does not have; other byte orders are no numbers here.
host::Array view(const py::array& a);
host::Arrays view(const PyArrays& list);

// The same of an array that is written to.
host::Array view_writable(const py::array& a, const std::string& name);
host::Arrays view_writable(const PyArrays& list, const char* name);

// Contiguous and not cleared, on a cache line as torch allocates: whole lines can then be written past the cache.
py::array empty(const py::dtype& dtype, const host::Shape& shape);

}  // namespace lkv::python
