// gemm_binding.cpp: the CUDA-only matrix kernels, in the module that module.cpp makes.
#include "../gpu/binding.h"
#include "halfbyte/gemm.h"

namespace py = pybind11;

namespace halfbyte::gpu {

void bind_gemm(py::module_& module) {
  const auto arguments = [](Address x, int dtype, Address packed, Address absmax, Address nested,
                            Address codebook, Address offset, int format, int64_t blocksize, Address bias,
                            int64_t m, int64_t n, int64_t k, Address y, Address stream) {
    const Weight4 weight = weight_of(packed, absmax, nested, codebook, offset, format, blocksize);
    return cuda::Linear4{weight, at(x), at(bias), at(y), static_cast<DType>(dtype),
                         m,      n,     k,        true,  at(stream)};
  };
  module.def("linear_4bit_stream",
             [=](Address x, int dtype, Address packed, Address absmax, Address nested, Address codebook,
                 Address offset, int format, int64_t blocksize, Address bias, int64_t m, int64_t n, int64_t k,
                 Address y, int tiles, int depth, int device, Address stream) {
               const cuda::Linear4 a = arguments(x, dtype, packed, absmax, nested, codebook, offset, format,
                                                 blocksize, bias, m, n, k, y, stream);
               call(device, stream, [&] { return cuda::linear_4bit_stream(a, tiles, depth); });
             });
  module.def("linear_4bit_tile", [=](Address x, int dtype, Address packed, Address absmax, Address nested,
                                     Address codebook, Address offset, int format, int64_t blocksize,
                                     Address bias, int64_t m, int64_t n, int64_t k, Address y, int columns,
                                     int groups, int turns, int log_splits, int device, Address stream) {
    const cuda::Linear4 a = arguments(x, dtype, packed, absmax, nested, codebook, offset, format, blocksize,
                                      bias, m, n, k, y, stream);
    call(device, stream, [&] { return cuda::linear_4bit_tile(a, columns, groups, turns, log_splits); });
  });
}

}  // namespace halfbyte::gpu
