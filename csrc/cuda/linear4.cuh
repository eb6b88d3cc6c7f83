// linear4.cuh: what the tensor-core kernels of linear_4bit share: the table of pairs, the scales.
#pragma once
#include <cstring>

#include "halfbyte/gemm.h"
#include "halfbyte/tables.h"
#include "hopper.cuh"

namespace halfbyte::cuda {

struct Levels {
  uint16_t of[16];  // the format's levels, rounded to x's dtype
};

// The scales of a weight: float32, or codes of a nested quantization.
struct Scales {
  const void* absmax;
  const float *nested_absmax, *nested_codebook, *offset;
  int per_row, shift;
};

template <typename T>
uint16_t bits(float v);
template <>
inline uint16_t bits<__nv_bfloat16>(float v) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(v));
}
template <>
inline uint16_t bits<__half>(float v) {
  return __half_as_ushort(__float2half_rn(v));
}

template <typename T>
Levels levels_of(Format format) {
  const float* levels = format == Format::fp4 ? fp4_levels : nf4_levels;
  Levels rounded;
  for (int i = 0; i < 16; ++i) rounded.of[i] = bits<T>(levels[i]);
  return rounded;
}

inline Scales scales_of(const Linear4& a) {
  int shift = 0;
  while (int64_t(1) << shift < a.weight.blocksize) ++shift;
  const Absmax& s = a.weight.absmax;
  return {s.values, s.nested, s.codebook, s.offset, static_cast<int>(a.k >> shift), shift};
}

// -- the table of pairs ----------------------------------------------------------------------------------------

// T[byte] holds the levels of its two codes, the high nibble's first: a register of an MMA's A operand.  It stands 32
// times, T[byte] for lane l at 256 byte + 4 l, so that every lane has a bank of its own and one byte permutation makes an
// address.  The 128 bytes between two entries are free for other use: gap().  The runtime keeps the first KiB of shared
// memory on sm_90; the table follows it, which makes its place the immediate of a look-up.
constexpr uint32_t kTable = 65536, kTable_at = 1024;

__device__ __forceinline__ void fill_table(uint8_t* smem, const Levels& levels, int thread, int threads) {
  for (int i = thread; i < 256 * 8; i += threads) {
    const int b = i >> 3;
    const uint32_t v = levels.of[b >> 4] | static_cast<uint32_t>(levels.of[b & 15]) << 16;
    *reinterpret_cast<uint4*>(smem + b * 256 + (i & 7) * 16) = make_uint4(v, v, v, v);
  }
}
// The entry of byte `at` of w.  lane: 4 * lane, and in a cluster the CTA's rank above (the highest byte).
__device__ __forceinline__ uint32_t lookup(uint32_t w, uint32_t selector, uint32_t lane) {
  uint32_t v;  // not volatile: the table never changes, so look-ups may move
  asm("ld.shared.b32 %0, [%1 + 1024];" : "=r"(v) : "r"(__byte_perm(w, lane, selector)));
  return v;
}
__host__ __device__ constexpr uint32_t selector(uint32_t byte) { return 0x7504 | byte << 4; }
// Byte i of the free space between the table's entries, contiguous in pieces of 128.
__device__ __forceinline__ constexpr uint32_t gap(uint32_t i) { return (i >> 7) * 256 + 128 + (i & 127); }

// -- scales ----------------------------------------------------------------------------------------------------

// A nested scale.  codebook: its first byte, in gaps.  The reference's order: a product, then a sum, each rounded.
__device__ __forceinline__ float unnest(uint32_t code, float group, const uint8_t* codebook, float offset) {
  const float level = *reinterpret_cast<const float*>(codebook + (code >> 5) * 256 + (code & 31) * 4);
  return __fadd_rn(__fmul_rn(level, group), offset);
}

// The codebook of nested scales, in gaps, by `threads` threads that then wait; gives the offset.
__device__ __forceinline__ float fill_codebook(uint8_t* codebook, const Scales& s, int thread, int threads) {
  for (int i = thread; i < 256; i += threads)
    *reinterpret_cast<float*>(codebook + (i >> 5) * 256 + (i & 31) * 4) = s.nested_codebook[i];
  return *s.offset;
}

// The raw scales of four blocks of 64 of one row, as loaded; of a nested quantization one word of codes and the scale
// of their group (a multiple of four blocks lies in one group of 256).
template <bool NESTED>
struct RawScales;
template <>
struct RawScales<false> {
  float v[4];
  __device__ __forceinline__ void load(const Scales& s, int64_t row, int k) {
    const float* p = static_cast<const float*>(s.absmax) + row * s.per_row;
    if (s.shift == 6) {
      const float4 f = __ldg(reinterpret_cast<const float4*>(p + (k >> 6)));
      v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = __ldg(p + ((k + 64 * j) >> s.shift));
    }
  }
  __device__ __forceinline__ void clear() { v[0] = v[1] = v[2] = v[3] = 0.f; }
  __device__ __forceinline__ float4 value(const uint8_t*, float) const {
    return make_float4(v[0], v[1], v[2], v[3]);
  }
};
template <>
struct RawScales<true> {
  uint32_t codes;
  float group;
  __device__ __forceinline__ void load(const Scales& s, int64_t row, int k) {
    const int64_t first = row * s.per_row;
    const uint8_t* p = static_cast<const uint8_t*>(s.absmax) + first;
    if (s.shift == 6) {
      codes = __ldg(reinterpret_cast<const uint32_t*>(p + (k >> 6)));
    } else {
      codes = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        codes |= static_cast<uint32_t>(__ldg(p + ((k + 64 * j) >> s.shift))) << (8 * j);
    }
    group = __ldg(s.nested_absmax + ((first + (k >> s.shift)) >> 8));
  }
  __device__ __forceinline__ void clear() { codes = 0, group = 0.f; }
  __device__ __forceinline__ float4 value(const uint8_t* codebook, float offset) const {
    return make_float4(
        unnest(codes & 255, group, codebook, offset), unnest(codes >> 8 & 255, group, codebook, offset),
        unnest(codes >> 16 & 255, group, codebook, offset), unnest(codes >> 24, group, codebook, offset));
  }
};

}  // namespace halfbyte::cuda
