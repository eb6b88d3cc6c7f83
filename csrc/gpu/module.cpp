// module.cpp: the Python module _C of halfbyte_cuda, halfbyte_rocm, halfbyte_xpu and the emulation; compiled by
// the host's compiler in all of them.  Every function takes the device and the stream last.
#include "binding.h"

namespace py = pybind11;
using namespace halfbyte;
using namespace halfbyte::gpu;

namespace halfbyte::gpu {
void bind_gemm(py::module_& module);  // ../cuda
void bind_gemm8(py::module_& module);
void bind_backward4(py::module_& module);
void bind_sycl(py::module_& module);  // ../sycl
}  // namespace halfbyte::gpu

namespace {

DType dtype_of(int code) { return static_cast<DType>(code); }

void bind_managed(py::module_& module) {
  module.def("managed_alloc", [](int64_t size, int device) {
    void* data = nullptr;
    call(device, 0, [&] { return managed_alloc(size, &data); });
    return reinterpret_cast<Address>(data);
  });
  module.def("managed_free",
             [](Address data, int device) { call(device, 0, [&] { return managed_free(at(data)); }); });
  module.def("managed_prefetch", [](Address data, int64_t size, int device, Address stream) {
    call(device, stream, [&] { return managed_prefetch(at(data), size, at(stream)); });
  });
}

void bind_4bit(py::module_& module) {
  module.def("quantize_4bit", [](Address x, int dtype, int64_t count, int format, int64_t blocksize,
                                 Address packed, Address absmax, int device, Address stream) {
    call(device, stream, [&] {
      return quantize_4bit(at(x), dtype_of(dtype), count, static_cast<Format>(format), blocksize,
                           at<uint8_t>(packed), at<float>(absmax), at(stream));
    });
  });
  module.def("dequantize_4bit", [](Address packed, Address absmax, Address nested, Address codebook,
                                   Address offset, int format, int64_t blocksize, int64_t k, int64_t row,
                                   int64_t rows, int64_t column, int64_t columns, Address out, int dtype,
                                   int device, Address stream) {
    const Weight4 w = weight_of(packed, absmax, nested, codebook, offset, format, blocksize);
    const Part part = {k, row, rows, column, columns};
    call(device, stream, [&] { return dequantize_4bit(w, part, at(out), dtype_of(dtype), at(stream)); });
  });
}

void bind_linear_4bit(py::module_& module) {
  module.attr("few_rows") = kFewRows;
  module.def("linear_4bit", [](Address x, int dtype, Address packed, Address absmax, Address nested,
                               Address codebook, Address offset, int format, int64_t blocksize, Address bias,
                               int64_t m, int64_t n, int64_t k, Address y, int device, Address stream) {
    const Weight4 w = weight_of(packed, absmax, nested, codebook, offset, format, blocksize);
    call(device, stream,
         [&] { return linear_4bit(at(x), dtype_of(dtype), w, at(bias), m, n, k, at(y), at(stream)); });
  });
}

void bind_8bit(py::module_& module) {
  module.def("quantize_8bit", [](Address x, int dtype, int64_t count, Address codebook, int64_t blocksize,
                                 Address codes, Address absmax, int device, Address stream) {
    call(device, stream, [&] {
      return quantize_8bit(at(x), dtype_of(dtype), count, at<const float>(codebook), blocksize,
                           at<uint8_t>(codes), at<float>(absmax), at(stream));
    });
  });
  module.def("dequantize_8bit", [](Address codes, Address absmax, Address codebook, int64_t blocksize,
                                   Address out, int dtype, int64_t count, int device, Address stream) {
    call(device, stream, [&] {
      return dequantize_8bit(at<const uint8_t>(codes), at<const float>(absmax), at<const float>(codebook),
                             blocksize, at(out), dtype_of(dtype), count, at(stream));
    });
  });
}

// What linear_int8_exact needs besides its arguments, one after the other, the largest alignment first.
struct Int8Workspace {
  int8_t* q;
  float* absmax;
  int32_t* list;  // and the count
  uint8_t* flags;

  static int64_t codes(int64_t m, int64_t k) { return (m * k + 15) / 16 * 16; }
  static int64_t size(int64_t m, int64_t k) { return codes(m, k) + 4 * m + 4 * (k + 1) + k; }

  Int8Workspace(char* data, int64_t m, int64_t k) {
    q = reinterpret_cast<int8_t*>(data);
    absmax = reinterpret_cast<float*>(data + codes(m, k));
    list = reinterpret_cast<int32_t*>(data + codes(m, k) + 4 * m);
    flags = reinterpret_cast<uint8_t*>(data + codes(m, k) + 4 * m + 4 * (k + 1));
  }
};

void bind_int8(py::module_& module) {
  module.def("quantize_int8_rows",
             [](Address x, int dtype, int64_t rows, int64_t k, float threshold, bool zero, Address q,
                Address absmax, Address outlier_columns, int device, Address stream) {
               call(device, stream, [&] {
                 return quantize_int8_rows(at(x), dtype_of(dtype), rows, k, threshold, zero, at<int8_t>(q),
                                           at<float>(absmax), at<uint8_t>(outlier_columns), at(stream));
               });
             });
  module.def("dequantize_int8",
             [](Address q, bool wide, Address row_absmax, Address col_absmax, Address bias, Address out,
                int dtype, int64_t rows, int64_t n, int device, Address stream) {
               call(device, stream, [&] {
                 return dequantize_int8(at(q), wide, at<const float>(row_absmax), at<const float>(col_absmax),
                                        at<const float>(bias), at(out), dtype_of(dtype), rows, n, at(stream));
               });
             });
  module.def("matmul_int8", [](Address a, Address b, int64_t m, int64_t n, int64_t k, Address out, int device,
                               Address stream) {
    call(device, stream, [&] {
      return matmul_int8(at<const int8_t>(a), at<const int8_t>(b), m, n, k, at<int32_t>(out), at(stream));
    });
  });
  module.def(
      "list_columns", [](Address flags, int64_t k, Address list, Address size, int device, Address stream) {
        call(device, stream, [&] {
          return list_columns(at<const uint8_t>(flags), k, at<int32_t>(list), at<int32_t>(size), at(stream));
        });
      });
  module.def("int8_workspace", [](int64_t m, int64_t k) { return Int8Workspace::size(m, k); });
  module.def("linear_int8_exact", [](Address x, int dtype, float threshold, Address workspace, Address weight,
                                     Address weight_absmax, Address bias, int64_t m, int64_t n, int64_t k,
                                     Address y, int device, Address stream) {
    const Int8Workspace w(at<char>(workspace), m, k);
    call(device, stream, [&]() -> const char* {
      if (const char* error = quantize_int8_rows(at(x), dtype_of(dtype), m, k, threshold, false, w.q,
                                                 w.absmax, w.flags, at(stream)))
        return error;
      Quantized quantized = {w.q, w.absmax, nullptr, nullptr};
      if (threshold > 0.0f) {
        if (const char* error = list_columns(w.flags, k, w.list, w.list + k, at(stream))) return error;
        quantized.list = w.list;
        quantized.size = w.list + k;
      }
      return linear_int8_exact(at(x), dtype_of(dtype), quantized, at<const int8_t>(weight),
                               at<const float>(weight_absmax), at(bias), m, n, k, at(y), at(stream));
    });
  });
  module.def("scale_int8", [](Address x, int dtype, Address row_absmax, Address list, Address size,
                              Address sums, Address weight, Address weight_absmax, Address bias, int64_t m,
                              int64_t n, int64_t k, Address y, int device, Address stream) {
    const Quantized quantized = {nullptr, at<const float>(row_absmax), at<const int32_t>(list),
                                 at<const int32_t>(size)};
    call(device, stream, [&] {
      return scale_int8(at(x), dtype_of(dtype), quantized, at<const int32_t>(sums), at<const int8_t>(weight),
                        at<const float>(weight_absmax), at(bias), m, n, k, at(y), at(stream));
    });
  });
  module.def(
      "linear_int8_w8a16", [](Address x, int dtype, Address weight, Address weight_absmax, Address bias,
                              int64_t m, int64_t n, int64_t k, Address y, int device, Address stream) {
        call(device, stream, [&] {
          return linear_int8_w8a16(at(x), dtype_of(dtype), at<const int8_t>(weight),
                                   at<const float>(weight_absmax), at(bias), m, n, k, at(y), at(stream));
        });
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
  bind_managed(module);
  bind_4bit(module);
  bind_linear_4bit(module);
  bind_8bit(module);
  bind_int8(module);
  bind_optimizer(module);
#ifdef HALFBYTE_GEMM
  bind_gemm(module);
  bind_gemm8(module);
  bind_backward4(module);
#endif
#ifdef HALFBYTE_SYCL
  bind_sycl(module);
#endif
}
