// blockwise.cuh: what quantizing to 4 and to 8 bits shares: chunks of a flat tensor in registers and the largest
// magnitude of the block that a chunk lies in.
#pragma once
#include "portable.cuh"

namespace halfbyte::gpu {

// Values per thread: two loads of 16 bytes.
template <class T>
constexpr int kChunk = 32 / sizeof(T);

// x[first .. first + kChunk), with zeros from `count` on.  Without a branch in the common case.
template <class T>
HALFBYTE_DEVICE void read_chunk(const T* x, int64_t first, int64_t count, float* v) {
  if (first + kChunk<T> <= count) {
    const Words<16> low = load<16>(x + first), high = load<16>(x + first + kChunk<T> / 2);
    widen_all<T>(low, v);
    widen_all<T>(high, v + kChunk<T> / 2);
    return;
  }
  HALFBYTE_UNROLL
  for (int i = 0; i < kChunk<T>; ++i) v[i] = first + i < count ? widen(x[first + i]) : 0.0f;
}

// NaN does not count.
template <int Count>
HALFBYTE_DEVICE float magnitude(const float* v) {
  float most = 0.0f;
  HALFBYTE_UNROLL
  for (int i = 0; i < Count; ++i) most = fmaxf(most, fabsf(v[i]));
  return most;
}

// The maximum over `lanes` neighbouring threads, a power of two; where that is more than one group, through
// shared memory, and then every thread of the block must come here.
template <bool Wide>
HALFBYTE_DEVICE float neighbours_max(float value, unsigned lanes) {
  for (unsigned mask = (lanes < kGroup ? lanes : kGroup) >> 1; mask > 0; mask >>= 1) {
    value = fmaxf(value, HALFBYTE_SHFL_XOR(value, static_cast<int>(mask)));
  }
  if constexpr (Wide) {
    __shared__ float of_group[1024 / kGroup];
    const unsigned group = threadIdx.x / kGroup, groups = lanes / kGroup;
    __syncthreads();  // the values of the round before have been read
    if (threadIdx.x % kGroup == 0) of_group[group] = value;
    __syncthreads();
    if (groups > 1) {
      const unsigned first = group & ~(groups - 1);
      for (unsigned i = 0; i < groups; ++i) value = fmaxf(value, of_group[first + i]);
    }
  }
  return value;
}

// 1 / absmax, or NaN where that overflows: all codes of such a block are 0, like NaN's.
HALFBYTE_DEVICE float reciprocal(float absmax) {
  const float r = 1.0f / absmax;
  return r == INFINITY ? NAN : r;
}

}  // namespace halfbyte::gpu
