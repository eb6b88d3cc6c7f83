// optimizer_binding.cpp: the optimizer updates in the Python module; native_gpu_optimizer.py calls them.
#include "halfbyte/gpu_optimizer.h"

#include <pybind11/stl.h>

#include "binding.h"

namespace py = pybind11;

namespace halfbyte::gpu {
namespace {

using Numbers = std::vector<double>;

Scalar scalar_of(std::pair<Address, int> number) {
  return {at<const void>(number.first), static_cast<Number>(number.second)};
}

// The order of ops/rules.py's Coefficients, then scale; empty where they are on the device.
Coefficients coefficients_of(const Numbers& numbers, uint32_t drawn) {
  Coefficients c = {};
  if (numbers.empty()) return c;
  if (numbers.size() != 15) throw py::value_error("an update has 15 coefficients");
  const auto f = [&](int i) { return static_cast<float>(numbers[static_cast<size_t>(i)]); };
  return {f(0), f(1), f(2),  f(3),  f(4),  f(5),  f(6),  f(7),
          f(8), f(9), f(10), f(11), f(12), f(13), f(14), drawn};
}

struct Trust {
  double max_unorm, eps;
  Address partial, sizes;
};

void run(bool quantized, Update update, const Trust& trust, int device, Address stream) {
  call(device, stream, [&]() -> const char* {
    if (trust.max_unorm > 0.0) {
      update.sizes = at<const float>(trust.sizes);
      if (const char* error = update_trust(update, quantized, trust.max_unorm, trust.eps,
                                           at<double>(trust.partial), at<float>(trust.sizes), at(stream)))
        return error;
    }
    return quantized ? update_8bit(update, at(stream)) : update_32bit(update, at(stream));
  });
}

}  // namespace

void bind_optimizer(py::module_& module) {
  module.attr("UPDATE_FIELDS") = kUpdateFields;
  module.attr("UPDATE_TENSOR_BYTES") = sizeof(UpdateTensor);
  module.attr("COEFFICIENTS_BYTES") = sizeof(Coefficients);
  module.def("update_chunks", [](Address fields, int64_t tensors) {
    return update_chunks(at<const int64_t>(fields), tensors);
  });
  module.def("plan_update", [](Address fields, int64_t tensors, int64_t chunks, int optimizer, int dtype,
                               int states, Address tensor, Address chunk, int device, Address stream) {
    call(device, stream, [&] {
      return plan_update(at<const int64_t>(fields), tensors, chunks, static_cast<Optimizer>(optimizer),
                         static_cast<DType>(dtype), states, at<UpdateTensor>(tensor), at<int32_t>(chunk),
                         at(stream));
    });
  });
  module.def(
      "update_coefficients", [](int optimizer, std::array<double, 6> hyper, std::array<int64_t, 2> rising,
                                std::pair<Address, int> step, std::pair<Address, int> lr,
                                std::pair<Address, int> scale, Address out, int device, Address stream) {
        const Hyper set = {hyper[0], hyper[1], hyper[2], hyper[3], hyper[4], hyper[5], rising[0], rising[1]};
        call(device, stream, [&] {
          return update_coefficients(static_cast<Optimizer>(optimizer), set, scalar_of(step), scalar_of(lr),
                                     scalar_of(scale), at<Coefficients>(out), at(stream));
        });
      });
  module.def("update",
             [](int optimizer, int dtype, bool quantized, bool skip_zeros, bool stochastic, int64_t tensors,
                int64_t chunks, Address tensor, Address chunk, Address codebook1, Address codebook2,
                const Numbers& numbers, uint32_t drawn, Address coefficients, double max_unorm, double eps,
                Address partial, Address sizes, int device, Address stream) {
               const Update update = {static_cast<Optimizer>(optimizer),
                                      static_cast<DType>(dtype),
                                      skip_zeros,
                                      stochastic,
                                      tensors,
                                      chunks,
                                      at<const UpdateTensor>(tensor),
                                      at<const int32_t>(chunk),
                                      at<const float>(codebook1),
                                      at<const float>(codebook2),
                                      nullptr,
                                      at<const Coefficients>(coefficients),
                                      coefficients_of(numbers, drawn)};
               run(quantized, update, {max_unorm, eps, partial, sizes}, device, stream);
             });
}

}  // namespace halfbyte::gpu
