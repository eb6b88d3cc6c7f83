// module.cpp: the Python module _C of halfbyte_cuda, halfbyte_rocm and the emulation; compiled by the host's
// compiler in all three.  Every function takes the device and the stream last.
#include "binding.h"

namespace py = pybind11;
using namespace halfbyte;
using namespace halfbyte::gpu;

#ifdef HALFBYTE_GEMM
namespace halfbyte::gpu {
void bind_gemm(py::module_& module);  // ../cuda
}
#endif

namespace {

DType dtype_of(int code) { return static_cast<DType>(code); }

void bind_4bit(py::module_& module) {
  module.def("quantize_4bit", [](Address x, int dtype, int64_t count, int format, int64_t blocksize,
                                 Address packed, Address absmax, int device, Address stream) {
    call(device, [&] {
      return quantize_4bit(at(x), dtype_of(dtype), count, static_cast<Format>(format), blocksize,
                           at<uint8_t>(packed), at<float>(absmax), at(stream));
    });
  });
  module.def("dequantize_4bit",
             [](Address packed, Address absmax, Address nested, Address codebook, Address offset, int format,
                int64_t blocksize, int64_t k, int64_t row, int64_t rows, int64_t column, int64_t columns,
                Address out, int dtype, int device, Address stream) {
               const Weight4 w = weight_of(packed, absmax, nested, codebook, offset, format, blocksize);
               const Part part = {k, row, rows, column, columns};
               call(device, [&] { return dequantize_4bit(w, part, at(out), dtype_of(dtype), at(stream)); });
             });
}

}  // namespace

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  module.doc() = "Portable GPU kernels of halfbyte.";
  module.def(
      "device_count",
      [] {
        const char* error = nullptr;
        const int count = device_count(&error);
        return py::make_tuple(count, error == nullptr ? "" : error);
      },
      "How many devices the driver shows, and why there is none.  Starts the driver.");
  module.def("archs", &archs, "What the module was built for, as the build named it.");
  bind_4bit(module);
#ifdef HALFBYTE_GEMM
  bind_gemm(module);
#endif
}
