// cpu.h: the CPU kernels as one table of functions per instruction set.
//
// Every function returns nullptr or a static error text; none prints, throws or exits.  Sizes count elements
// and are 64 bits wide; where one is 0, an empty tensor may be nullptr.  Tensors are contiguous with any
// alignment, `threads` is an upper limit of at least 1.
#pragma once
#include "halfbyte/types.h"

namespace halfbyte::cpu {

using halfbyte::Absmax;
using halfbyte::Weight4;

// The numbers of one step, see Coefficients in ops/rules.py; `norm` and what trust factors need stay in fp64.
struct Coefficients {
  float beta1, rest1, beta2, rest2, beta3, rest3, alpha, decay, coupled, size, eps, inverse1, inverse2;
  double norm;
};

// One parameter of an update.  States are fp32, or uint8 codes with absmax; a state that the optimizer does not
// keep is nullptr.  `slow` is the second half of AdEMAMix's absmax1; `key` draws the bits of stochastic
// rounding.
struct UpdateTensor {
  void* param;
  const void* grad;
  void* state1;
  void* state2;
  float* absmax1;
  float* slow;
  float* absmax2;
  int64_t count;
  uint32_t key;
};

// One step over `size` tensors.  trust: max_unorm, 0 for none; trust_eps: what one-state optimizers add to it.
struct Update {
  Optimizer optimizer;
  DType dtype;
  Coefficients c;
  float grad_scale;
  double trust, trust_eps;
  bool skip_zeros, stochastic;
  int64_t blocksize;
  const float* codebook1;
  const float* codebook2;
  const UpdateTensor* tensors;
  int64_t size;
};

// A function that a level lacks is nullptr: the caller takes a lower level's.
struct Level {
  const char* name;
  const char* (*quantize_4bit)(const void* x, DType dtype, int64_t count, Format format, int64_t blocksize,
                               uint8_t* packed, float* absmax, int threads);
  const char* (*dequantize_4bit)(Weight4 weight, void* out, DType dtype, int64_t count, int threads);
  const char* (*linear_4bit)(const void* x, DType dtype, Weight4 weight, const void* bias, int64_t m,
                             int64_t n, int64_t k, void* y, int threads);
  const char* (*linear_4bit_backward)(const void* dy, DType dtype, Weight4 weight, int64_t m, int64_t n,
                                      int64_t k, void* dx, int threads);
  const char* (*quantize_8bit)(const void* x, DType dtype, int64_t count, const float* codebook,
                               int64_t blocksize, uint8_t* codes, float* absmax, int threads);
  const char* (*dequantize_8bit)(const uint8_t* codes, const float* absmax, const float* codebook,
                                 int64_t blocksize, void* out, DType dtype, int64_t count, int threads);
  const char* (*quantize_int8_rows)(const void* x, DType dtype, int64_t rows, int64_t k, float threshold,
                                    int8_t* q, float* absmax, uint8_t* outlier_columns, int threads);
  // q is int32 where `wide`, else int8; col_absmax and bias (fp32) may be nullptr.
  const char* (*dequantize_int8)(const void* q, bool wide, const float* row_absmax, const float* col_absmax,
                                 const float* bias, void* out, DType dtype, int64_t rows, int64_t n,
                                 int threads);
  const char* (*matmul_int8)(const int8_t* a, const int8_t* b, int64_t m, int64_t n, int64_t k, int32_t* out,
                             int threads);
  // exact: x is quantized row-wise; otherwise only the weight is 8-bit and `threshold` plays no part.
  const char* (*linear_int8)(const void* x, DType dtype, const int8_t* weight, const float* weight_absmax,
                             const void* bias, float threshold, bool exact, int64_t m, int64_t n, int64_t k,
                             void* y, int threads);
  const char* (*update_32bit)(const Update& update, int threads);
  const char* (*update_8bit)(const Update& update, int threads);
};

// The built levels, lowest first; `count` receives how many.
const Level* const* levels(int* count);

// Whether this CPU and its operating system run the level.
bool supports(const char* name);

}  // namespace halfbyte::cpu
