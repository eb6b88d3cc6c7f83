// gemm8_binding.cpp: LLM.int8() on the tensor cores of sm_90a, in the module that module.cpp makes.
#include "../gpu/binding.h"
#include "halfbyte/gemm8.h"

namespace py = pybind11;

namespace halfbyte::gpu {

void bind_gemm8(py::module_& module) {
  module.def("linear_int8_tensor_workspace", &cuda::linear_int8_tensor_workspace);
  module.def("linear_int8_tensor", [](Address x, int dtype, float threshold, Address workspace,
                                      Address weight, Address weight_absmax, Address bias, int64_t m,
                                      int64_t n, int64_t k, Address y, int device, Address stream) {
    const cuda::Linear8 a = {at(x),
                             at<const int8_t>(weight),
                             at<const float>(weight_absmax),
                             at(bias),
                             at(y),
                             static_cast<DType>(dtype),
                             m,
                             n,
                             k,
                             threshold,
                             at(workspace),
                             at(stream)};
    call(device, stream, [&] { return cuda::linear_int8_tensor(a); });
  });
}

}  // namespace halfbyte::gpu
