// gemm_binding.cpp: the CUDA-only matrix kernels, in the module that module.cpp makes.
#include "../gpu/binding.h"
#include "halfbyte/gemm.h"

namespace py = pybind11;

namespace halfbyte::gpu {
namespace {

// A launcher, and the numbers that choose its variant.
template <class... Ints>
void define(py::module_& module, const char* name, const char* (*launch)(const cuda::Linear4&, Ints...)) {
  module.def(name,
             [launch](Address x, int dtype, Address packed, Address absmax, Address nested, Address codebook,
                      Address offset, int format, int64_t blocksize, Address bias, int64_t m, int64_t n,
                      int64_t k, Address y, Ints... variant, int device, Address stream) {
               const Weight4 weight = weight_of(packed, absmax, nested, codebook, offset, format, blocksize);
               const cuda::Linear4 a = {weight, at(x), at(bias), at(y), static_cast<DType>(dtype),
                                        m,      n,     k,        true,  at(stream)};
               call(device, stream, [&] { return launch(a, variant...); });
             });
}

}  // namespace

void bind_gemm(py::module_& module) {
  define(module, "linear_4bit_stream", cuda::linear_4bit_stream);
  define(module, "linear_4bit_tile", cuda::linear_4bit_tile);
  define(module, "linear_4bit_wide", cuda::linear_4bit_wide);
}

}  // namespace halfbyte::gpu
