// binding.cpp: what only the SYCL module tells Python.
#include "../gpu/binding.h"

#include <pybind11/stl.h>

#include "devices.h"

namespace halfbyte::gpu {

void bind_sycl(pybind11::module_& module) {
  module.def("devices", &xpu::devices, "The names of all devices that the SYCL runtime shows.");
  module.def("set_options", [](int lanes, bool optimized) {
    if (lanes != 0 && lanes != 16 && lanes != 32) throw pybind11::value_error("lanes must be 0, 16 or 32");
    xpu::set_options(lanes, optimized);
  });
}

}  // namespace halfbyte::gpu
