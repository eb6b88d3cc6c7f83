// types.h: the plain types that every native module and its binding share; halfbyte/native.py has their values.
#pragma once
#include <stdint.h>

namespace halfbyte {

enum class DType : int32_t { float32 = 0, float16 = 1, bfloat16 = 2 };
enum class Format : int32_t { nf4 = 0, fp4 = 1 };
enum class Optimizer : int32_t { adam = 0, ademamix = 1, lion = 2, momentum = 3, rmsprop = 4, adagrad = 5 };

}  // namespace halfbyte
