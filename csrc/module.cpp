// The Python module sep_attn._C. Loading it registers the operators of torch_ops.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dispatch.h"
#include "torch_ops.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  sep_attn::set_capability_from_environment();

  m.doc() = "CPU kernels of sep_attn; see _C.pyi.";
  m.def("version", [] { return SEP_ATTN_VERSION; });
  m.def("capability", &sep_attn::capability);
  m.def("capabilities", &sep_attn::capabilities);
  m.def("compiled_capabilities", &sep_attn::compiled_capabilities);
  m.def("set_capability", &sep_attn::set_capability, py::arg("name"));
  m.def("kernel_calls", [] {
    py::dict calls;
    for (const auto& [name, count] : sep_attn::kernel_calls()) {
      if (count > 0) calls[py::str(name)] = count;
    }
    return calls;
  });
  m.def("reset_kernel_calls", &sep_attn::reset_kernel_calls);
  m.def(
      "packed_weights_bytes",
      [](const std::string& dtype, int64_t channels) {
        return sep_attn::packed_weights_bytes(sep_attn::dtype_named(dtype), channels);
      },
      py::arg("dtype"), py::arg("channels"));
  m.def("poison_results", &sep_attn::poison_results, py::arg("enabled"));
}
