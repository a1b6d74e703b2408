#include <pybind11/pybind11.h>

#include "build_info.h"
#include "lkv/cpu.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  namespace build = lkv::build;
  const auto or_none = [](const char* text) -> py::object { return *text ? py::object(py::str(text)) : py::none(); };
  py::dict info;
  info["version"] = build::version;
  info["cxx_compiler"] = build::cxx_compiler;
  info["cpu_isa"] = lkv::cpu::isa();
  info["cuda_compiler"] = or_none(build::cuda_compiler);
  info["cuda_archs"] = *build::cuda_compiler ? or_none(build::cuda_archs) : py::none();
  info["torch_built_against"] = or_none(build::torch_version);
  info["torch_abi_target"] = *build::torch_version ? or_none(build::torch_abi) : py::none();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) { m.def("build_info", &build_info); }
