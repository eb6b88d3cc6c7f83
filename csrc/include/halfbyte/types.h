// types.h: the plain types that every native module and its binding share.  Values are part of the Python
// API.
#pragma once
#include <stdint.h>

namespace halfbyte {

enum class DType : int32_t { float32 = 0, float16 = 1, bfloat16 = 2 };
enum class Format : int32_t { nf4 = 0, fp4 = 1 };

}  // namespace halfbyte
