// types.h: the plain types that every native module and its binding share; halfbyte/native.py has their values.
#pragma once
#include <stdint.h>

namespace halfbyte {

enum class DType : int32_t { float32 = 0, float16 = 1, bfloat16 = 2 };
enum class Format : int32_t { nf4 = 0, fp4 = 1 };
enum class Optimizer : int32_t { adam = 0, ademamix = 1, lion = 2, momentum = 3, rmsprop = 4, adagrad = 5 };

// One fp32 scale per block: `values` itself, or, where `nested` is given, values[i] are uint8 codes and
// absmax[i] = codebook[values[i]] * nested[i / 256] + *offset, product and sum each rounded.
struct Absmax {
  const void* values;
  const float* nested;
  const float* codebook;
  const float* offset;
};

// A 4-bit weight [n, k], flattened row-major: blocks may cross rows.
struct Weight4 {
  const uint8_t* packed;
  Absmax absmax;
  Format format;
  int64_t blocksize;  // a power of two, 32 .. 4096
};

}  // namespace halfbyte
