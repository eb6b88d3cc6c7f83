// backward4_binding.cpp: the gradient of a 4-bit layer in one call: slabs of the weight, dequantized, each in turn
// multiplied by the cuBLAS that torch has loaded, with torch's handle.
#ifndef _WIN32
#include <dlfcn.h>
#endif

#include <algorithm>

#include "../gpu/binding.h"

namespace py = pybind11;

namespace halfbyte::gpu {
namespace {

// cublasGemmEx as cublas_v2.h has it since CUDA 11; enumerations are ints.
using GemmEx = int (*)(void* handle, int transposed_a, int transposed_b, int m, int n, int k,
                       const void* alpha, const void* a, int type_a, int lda, const void* b, int type_b,
                       int ldb, const void* beta, void* c, int type_c, int ldc, int compute_type,
                       int algorithm);
constexpr int kNotTransposed = 0;    // CUBLAS_OP_N
constexpr int kHalf = 2;             // CUDA_R_16F
constexpr int kBFloat16 = 14;        // CUDA_R_16BF
constexpr int kComputeInFloat = 68;  // CUBLAS_COMPUTE_32F
constexpr int kDefault = -1;         // CUBLAS_GEMM_DEFAULT

// nullptr where the process has no cuBLAS of these versions.
GemmEx find_gemm() {
#ifndef _WIN32
  for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so.11"})
    if (void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD))
      return reinterpret_cast<GemmEx>(dlsym(library, "cublasGemmEx"));
#endif
  return nullptr;
}

GemmEx gemm() {
  static const GemmEx found = find_gemm();
  return found;
}

struct Slab {
  void* data;  // [n, columns], aligned to 16 bytes
  int64_t columns;
};

// dx = dy @ weight: dy [m, n], weight [n, k], dx [m, k], in float16 or bfloat16; sizes below 2^31.
const char* backward(const void* dy, DType dtype, Weight4 weight, int64_t m, int64_t n, int64_t k, Slab slab,
                     void* dx, void* handle, void* stream) {
  const int type = dtype == DType::bfloat16 ? kBFloat16 : kHalf;
  const float one = 1.0f, zero = 0.0f;
  for (int64_t first = 0; first < k; first += slab.columns) {
    const int64_t columns = std::min(slab.columns, k - first);
    const Part part = {k, 0, n, first, columns};
    if (const char* error = dequantize_4bit(weight, part, slab.data, dtype, stream)) return error;
    // In cuBLAS's order of columns, all matrices are their transposes.
    void* out = static_cast<uint16_t*>(dx) + first;
    if (gemm()(handle, kNotTransposed, kNotTransposed, int(columns), int(m), int(n), &one, slab.data, type,
               int(columns), dy, type, int(n), &zero, out, type, int(k), kComputeInFloat, kDefault))
      return "cublasGemmEx failed";
  }
  return nullptr;
}

}  // namespace

void bind_backward4(py::module_& module) {
  module.def("has_cublas", [] { return gemm() != nullptr; });
  module.def("linear_4bit_backward",
             [](Address dy, int dtype, Address packed, Address absmax, Address nested, Address codebook,
                Address offset, int format, int64_t blocksize, int64_t m, int64_t n, int64_t k, Address slab,
                int64_t columns, Address dx, Address handle, int device, Address stream) {
               const Weight4 weight = weight_of(packed, absmax, nested, codebook, offset, format, blocksize);
               call(device, stream, [&] {
                 return backward(at(dy), static_cast<DType>(dtype), weight, m, n, k, {at(slab), columns},
                                 at(dx), at(handle), at(stream));
               });
             });
}

}  // namespace halfbyte::gpu
