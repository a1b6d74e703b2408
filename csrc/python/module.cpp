#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include "build_info.h"
#include "lkv/cpu.h"
#include "ops.h"
#include "plan.h"

namespace py = pybind11;

namespace {

using lkv::python::Index;
using lkv::python::Request;

py::dict build_info() {
  namespace build = lkv::build;
  const auto or_none = [](const char* text) -> py::object { return *text ? py::object(py::str(text)) : py::none(); };
  py::dict info;
  info["version"] = build::version;
  info["cxx_compiler"] = build::cxx_compiler;
  info["cpu_isa"] = lkv::cpu::isa();
  info["cuda_compiler"] = or_none(build::cuda_compiler);
  info["cuda_archs"] = *build::cuda_compiler ? or_none(build::cuda_archs) : py::none();
  info["cuda_driver"] = or_none(build::cuda_driver);
  info["torch_built_against"] = or_none(build::torch_version);
  info["torch_abi_target"] = *build::torch_version ? or_none(build::torch_abi) : py::none();
  return info;
}

#define LKV_TYPE(type, name, fallback) , lkv::python::type
#define LKV_KEYWORD(type, name, fallback) , py::arg(#name) fallback

void define_ops(py::module_& m) {
  constexpr std::nullopt_t None = std::nullopt;  // as the table has them
  constexpr bool False = false;
  py::class_<Request>(m, "Request")
      .def(py::init<int64_t LKV_ARGUMENTS(LKV_TYPE, LKV_NOTHING)>(), py::kw_only(),
           py::arg("threads") LKV_ARGUMENTS(LKV_KEYWORD, LKV_NOTHING));
  py::class_<Index>(m, "Index")
      .def(py::init<py::array, py::array, py::array>(), py::arg("positions"), py::arg("lengths"), py::arg("cu_seqlens"))
      .def_readonly("positions", &Index::positions)
      .def_readonly("lengths", &Index::lengths)
      .def_readonly("cu_seqlens", &Index::cu_seqlens);
  m.def("select", &lkv::python::select, py::arg("scores"), py::arg("request"));
  m.def("gather", &lkv::python::gather, py::arg("arrays"), py::arg("index"), py::arg("batch"), py::arg("heads"),
        py::arg("cu_seqlens"), py::arg("threads"));
  m.def("evict", &lkv::python::evict, py::arg("payload"), py::arg("scores"), py::arg("request"));
  m.def("evict_out", &lkv::python::evict_out, py::arg("out"), py::arg("index"), py::arg("payload"), py::arg("scores"),
        py::arg("request"));
  m.def("evict_", &lkv::python::evict_in_place, py::arg("payload"), py::arg("scores"), py::arg("request"));
  m.def("evict_paged_", &lkv::python::evict_paged, py::arg("pools"), py::arg("scores"), py::arg("tables"),
        py::arg("request"));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  define_ops(m);
  m.def("plan_select", &lkv::python::plan_select, py::arg("segments"), py::arg("longest"), py::arg("multiprocessors"),
        py::arg("shared_per_block"), py::arg("active"), py::arg("beside") = false);
}
