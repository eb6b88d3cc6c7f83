// rows8.cuh: how a value becomes int8 where its row's largest magnitude is 127.
#pragma once
#include "portable.cuh"

namespace halfbyte::gpu {

HALFBYTE_DEVICE float row_scale(float most) { return most > 0.0f ? 127.0f / most : 0.0f; }

// In the last byte.
HALFBYTE_DEVICE uint32_t code_of(float scaled) {
  const float number = scaled == scaled ? scaled : 0.0f;
  return narrow_byte(fminf(fmaxf(number, -127.0f), 127.0f));
}

}  // namespace halfbyte::gpu
