// module.cpp: the Python module halfbyte_cpu._C.  Addresses and sizes come in as integers; the adapters in
// kernels.py have checked them and keep the tensors alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <vector>

#include "halfbyte/cpu.h"

namespace py = pybind11;
using halfbyte::DType;
using halfbyte::Format;
using halfbyte::cpu::Absmax;
using halfbyte::cpu::Coefficients;
using halfbyte::cpu::Level;
using halfbyte::cpu::Update;
using halfbyte::cpu::UpdateTensor;
using halfbyte::cpu::Weight4;
using Address = uintptr_t;

namespace {

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Without the interpreter's lock; a text becomes RuntimeError.
template <class Function>
void call(const Function& function) {
  const char* error;
  {
    py::gil_scoped_release release;
    error = function();
  }
  if (error != nullptr) throw std::runtime_error(error);
}

DType dtype_of(int code) { return static_cast<DType>(code); }

Weight4 weight_of(Address packed, Address absmax, Address nested, Address codebook, Address offset,
                  int format, int64_t blocksize) {
  return {at<const uint8_t>(packed),
          {at(absmax), at<const float>(nested), at<const float>(codebook), at<const float>(offset)},
          static_cast<Format>(format),
          blocksize};
}

// Numbers of one call in the order of kernels.py: 13 fp32 coefficients, norm, grad_scale, trust, trust_eps.
constexpr size_t kNumbers = 17;
// Of each tensor: param, grad, state1, state2, absmax1, slow, absmax2, count, key.
constexpr size_t kFields = 9;

Update update_of(int optimizer, int dtype, const std::vector<double>& v, bool skip_zeros, bool stochastic,
                 const std::vector<UpdateTensor>& tensors) {
  const auto f = [&](size_t i) { return static_cast<float>(v[i]); };
  const Coefficients c = {f(0), f(1), f(2), f(3),  f(4),  f(5),  f(6),
                          f(7), f(8), f(9), f(10), f(11), f(12), v[13]};
  return {static_cast<halfbyte::Optimizer>(optimizer),
          dtype_of(dtype),
          c,
          f(14),
          v[15],
          v[16],
          skip_zeros,
          stochastic,
          0,
          nullptr,
          nullptr,
          tensors.data(),
          static_cast<int64_t>(tensors.size())};
}

std::vector<UpdateTensor> tensors_of(const std::vector<uint64_t>& fields) {
  std::vector<UpdateTensor> tensors;
  tensors.reserve(fields.size() / kFields);
  for (size_t i = 0; i + kFields <= fields.size(); i += kFields) {
    const uint64_t* t = fields.data() + i;
    tensors.push_back({at(t[0]), at(t[1]), at(t[2]), at(t[3]), at<float>(t[4]), at<float>(t[5]),
                       at<float>(t[6]), static_cast<int64_t>(t[7]), static_cast<uint32_t>(t[8])});
  }
  return tensors;
}

py::dict functions_of(const Level* level) {
  py::dict all;
  const auto add = [&](const char* name, auto present, auto&& function) {
    if (present != nullptr) all[name] = py::cpp_function(std::move(function), py::name(name));
  };
  add("quantize_4bit", level->quantize_4bit,
      [f = level->quantize_4bit](Address x, int dtype, int64_t count, int format, int64_t blocksize,
                                 Address packed, Address absmax, int threads) {
        call([&] {
          return f(at(x), dtype_of(dtype), count, static_cast<Format>(format), blocksize, at<uint8_t>(packed),
                   at<float>(absmax), threads);
        });
      });
  add("dequantize_4bit", level->dequantize_4bit,
      [f = level->dequantize_4bit](Address packed, Address absmax, Address nested, Address codebook,
                                   Address offset, int format, int64_t blocksize, Address out, int dtype,
                                   int64_t count, int threads) {
        const Weight4 w = weight_of(packed, absmax, nested, codebook, offset, format, blocksize);
        call([&] { return f(w, at(out), dtype_of(dtype), count, threads); });
      });
  add("linear_4bit", level->linear_4bit,
      [f = level->linear_4bit](Address x, int dtype, Address packed, Address absmax, Address nested,
                               Address codebook, Address offset, int format, int64_t blocksize, Address bias,
                               int64_t m, int64_t n, int64_t k, Address y, int threads) {
        const Weight4 w = weight_of(packed, absmax, nested, codebook, offset, format, blocksize);
        call([&] { return f(at(x), dtype_of(dtype), w, at(bias), m, n, k, at(y), threads); });
      });
  add("linear_4bit_backward", level->linear_4bit_backward,
      [f = level->linear_4bit_backward](Address dy, int dtype, Address packed, Address absmax, Address nested,
                                        Address codebook, Address offset, int format, int64_t blocksize,
                                        int64_t m, int64_t n, int64_t k, Address dx, int threads) {
        const Weight4 w = weight_of(packed, absmax, nested, codebook, offset, format, blocksize);
        call([&] { return f(at(dy), dtype_of(dtype), w, m, n, k, at(dx), threads); });
      });
  add("quantize_8bit", level->quantize_8bit,
      [f = level->quantize_8bit](Address x, int dtype, int64_t count, Address codebook, int64_t blocksize,
                                 Address codes, Address absmax, int threads) {
        call([&] {
          return f(at(x), dtype_of(dtype), count, at<const float>(codebook), blocksize, at<uint8_t>(codes),
                   at<float>(absmax), threads);
        });
      });
  add("dequantize_8bit", level->dequantize_8bit,
      [f = level->dequantize_8bit](Address codes, Address absmax, Address codebook, int64_t blocksize,
                                   Address out, int dtype, int64_t count, int threads) {
        call([&] {
          return f(at<const uint8_t>(codes), at<const float>(absmax), at<const float>(codebook), blocksize,
                   at(out), dtype_of(dtype), count, threads);
        });
      });
  add("quantize_int8_rows", level->quantize_int8_rows,
      [f = level->quantize_int8_rows](Address x, int dtype, int64_t rows, int64_t k, float threshold,
                                      Address q, Address absmax, Address outlier_columns, int threads) {
        call([&] {
          return f(at(x), dtype_of(dtype), rows, k, threshold, at<int8_t>(q), at<float>(absmax),
                   at<uint8_t>(outlier_columns), threads);
        });
      });
  add("dequantize_int8", level->dequantize_int8,
      [f = level->dequantize_int8](Address q, bool wide, Address row_absmax, Address col_absmax, Address bias,
                                   Address out, int dtype, int64_t rows, int64_t n, int threads) {
        call([&] {
          return f(at(q), wide, at<const float>(row_absmax), at<const float>(col_absmax),
                   at<const float>(bias), at(out), dtype_of(dtype), rows, n, threads);
        });
      });
  add("matmul_int8", level->matmul_int8,
      [f = level->matmul_int8](Address a, Address b, int64_t m, int64_t n, int64_t k, Address out,
                               int threads) {
        call([&] { return f(at<const int8_t>(a), at<const int8_t>(b), m, n, k, at<int32_t>(out), threads); });
      });
  add("linear_int8", level->linear_int8,
      [f = level->linear_int8](Address x, int dtype, Address weight, Address weight_absmax, Address bias,
                               float threshold, bool exact, int64_t m, int64_t n, int64_t k, Address y,
                               int threads) {
        call([&] {
          return f(at(x), dtype_of(dtype), at<const int8_t>(weight), at<const float>(weight_absmax), at(bias),
                   threshold, exact, m, n, k, at(y), threads);
        });
      });
  add("update_32bit", level->update_32bit,
      [f = level->update_32bit](int optimizer, int dtype, const std::vector<double>& numbers, bool skip_zeros,
                                bool stochastic, const std::vector<uint64_t>& fields, int threads) {
        if (numbers.size() != kNumbers) throw std::invalid_argument("an update has 17 numbers");
        const std::vector<UpdateTensor> tensors = tensors_of(fields);
        const Update update = update_of(optimizer, dtype, numbers, skip_zeros, stochastic, tensors);
        call([&] { return f(update, threads); });
      });
  add("update_8bit", level->update_8bit,
      [f = level->update_8bit](int optimizer, int dtype, const std::vector<double>& numbers, bool skip_zeros,
                               bool stochastic, const std::vector<uint64_t>& fields, int64_t blocksize,
                               Address codebook1, Address codebook2, int threads) {
        if (numbers.size() != kNumbers) throw std::invalid_argument("an update has 17 numbers");
        const std::vector<UpdateTensor> tensors = tensors_of(fields);
        Update update = update_of(optimizer, dtype, numbers, skip_zeros, stochastic, tensors);
        update.blocksize = blocksize;
        update.codebook1 = at<const float>(codebook1);
        update.codebook2 = at<const float>(codebook2);
        call([&] { return f(update, threads); });
      });
  return all;
}

}  // namespace

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  module.doc() = "CPU kernels of halfbyte, one table of functions per instruction set.";
  module.def(
      "levels",
      [] {
        int count;
        const Level* const* all = halfbyte::cpu::levels(&count);
        py::dict levels;
        for (int i = 0; i < count; ++i) levels[all[i]->name] = functions_of(all[i]);
        return levels;
      },
      "The built levels, lowest first: name -> op -> function.");
  module.def(
      "supports", [](const char* name) { return halfbyte::cpu::supports(name); },
      "Whether this CPU runs the level.");
#ifdef _OPENMP
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
}
