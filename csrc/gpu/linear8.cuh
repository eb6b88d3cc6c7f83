// linear8.cuh: what the products with an int8 weight share: what is multiplied, and what becomes of the sums.
#pragma once
#include "halfbyte/gpu.h"
#include "portable.cuh"

namespace halfbyte::gpu {

constexpr float kPer127 = 1.0f / 127.0f;
constexpr float kPer127Squared = static_cast<float>(1.0 / (127.0 * 127.0));

// What is multiplied, and what becomes of the sums.  T is the dtype of x and y; int32_t for the bare product.
template <class T>
struct Product {
  const int8_t* a;  // [m, k], quantized
  const T* x;
  const int8_t* weight;
  int64_t m, n, k;
  const float* row_absmax;
  const float* weight_absmax;
  const T* bias;
  const int32_t* list;
  const int32_t* size;
  T* y;
};

template <class T>
HALFBYTE_DEVICE float scaled(const Product<T>& p, int64_t m, int64_t n, int32_t whole, float exact) {
  const float y = static_cast<float>(whole) * (p.row_absmax[m] * p.weight_absmax[n]) * kPer127Squared + exact;
  return p.bias != nullptr ? y + widen(p.bias[n]) : y;
}

}  // namespace halfbyte::gpu
