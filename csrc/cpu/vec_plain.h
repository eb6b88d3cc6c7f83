// vec_plain.h: eight fp32 lanes in plain C++, for any machine.  The compiler vectorises what it can.
#pragma once
#include "prelude.h"

namespace halfbyte::cpu {
namespace {

HALFBYTE_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return as_float(sign | 0x7f800000u | (magnitude << 13));  // inf, nan
  if (magnitude >= 0x0400u) return as_float(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-08f;  // 2^-24, exact
  return as_float(sign | as_bits(subnormal));
}

HALFBYTE_INLINE uint16_t float_to_half(float f) {
  const uint32_t bits = as_bits(f), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits.
    const float shifted = as_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (as_bits(shifted) - 0x3f000000u));
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

HALFBYTE_INLINE uint16_t float_to_bfloat(float f) {
  const uint32_t bits = as_bits(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

HALFBYTE_INLINE float widen(float x) { return x; }
HALFBYTE_INLINE float widen(Half x) { return half_to_float(x.bits); }
HALFBYTE_INLINE float widen(BFloat x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
HALFBYTE_INLINE void narrow(float* p, float x) { write(p, x); }
HALFBYTE_INLINE void narrow(Half* p, float x) { write(p, Half{float_to_half(x)}); }
HALFBYTE_INLINE void narrow(BFloat* p, float x) { write(p, BFloat{float_to_bfloat(x)}); }

struct Plain {
  static constexpr int W = 8;
  static constexpr int kRows = 2, kColumns = 1, kSmall = 4,
                       kSmallRows = 1;  // see dot.h, backward4.h, linear4.h
  struct F {
    float v[W];
  };
  struct I {
    int32_t v[W];
  };

#define HALFBYTE_LANES for (int i = 0; i < W; ++i)
  template <class T>
  static F load(const T* p) {
    F r;
    HALFBYTE_LANES r.v[i] = widen(read<T>(p + i));
    return r;
  }
  template <class T>
  static void store(T* p, F a) {
    HALFBYTE_LANES narrow(p + i, a.v[i]);
  }
  template <class T>
  static void stream(T* p, F a) {
    store(p, a);
  }
  static void fence() {}
  static F from_int(const int8_t* p) {
    F r;
    HALFBYTE_LANES r.v[i] = static_cast<float>(p[i]);
    return r;
  }
  static F from_int(const int32_t* p) {
    F r;
    HALFBYTE_LANES r.v[i] = static_cast<float>(read<int32_t>(p + i));
    return r;
  }
  static F set1(float x) {
    F r;
    HALFBYTE_LANES r.v[i] = x;
    return r;
  }
  static F mul(F a, F b) {
    HALFBYTE_LANES a.v[i] *= b.v[i];
    return a;
  }
  static F add(F a, F b) {
    HALFBYTE_LANES a.v[i] += b.v[i];
    return a;
  }
  static F sub(F a, F b) {
    HALFBYTE_LANES a.v[i] -= b.v[i];
    return a;
  }
  static F div(F a, F b) {
    HALFBYTE_LANES a.v[i] /= b.v[i];
    return a;
  }
  static F sqrt(F a) {
    HALFBYTE_LANES a.v[i] = __builtin_sqrtf(a.v[i]);
    return a;
  }
  // -1, +0 or 1; NaN stays.
  static F sign(F a) {
    HALFBYTE_LANES a.v[i] = a.v[i] > 0.0f ? 1.0f : a.v[i] < 0.0f ? -1.0f : a.v[i] + 0.0f;
    return a;
  }
  static F fma(F a, F b, F c) {
    HALFBYTE_LANES c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  static F abs(F a) {
    HALFBYTE_LANES a.v[i] = __builtin_fabsf(a.v[i]);
    return a;
  }
  // The larger; `keep` where x is NaN.
  static F max_keep(F keep, F x) {
    HALFBYTE_LANES keep.v[i] = x.v[i] > keep.v[i] ? x.v[i] : keep.v[i];
    return keep;
  }
  static float hmax(F a) {
    float r = a.v[0];
    HALFBYTE_LANES r = a.v[i] > r ? a.v[i] : r;
    return r;
  }
  static float hsum(F a) {
    return ((a.v[0] + a.v[4]) + (a.v[1] + a.v[5])) + ((a.v[2] + a.v[6]) + (a.v[3] + a.v[7]));
  }
  static void add4(float* to, F a, F b, F c, F d) {
    to[0] += hsum(a);
    to[1] += hsum(b);
    to[2] += hsum(c);
    to[3] += hsum(d);
  }
  // Bit i: a >= b in lane i.
  static uint32_t mask_ge(F a, F b) {
    uint32_t r = 0;
    HALFBYTE_LANES r |= static_cast<uint32_t>(a.v[i] >= b.v[i]) << i;
    return r;
  }
  // Bit i: lane i is finite, is zero.
  static uint32_t mask_finite(F a) {
    uint32_t r = 0;
    HALFBYTE_LANES r |= static_cast<uint32_t>((as_bits(a.v[i]) & 0x7f800000u) != 0x7f800000u) << i;
    return r;
  }
  static uint32_t mask_zero(F a) {
    uint32_t r = 0;
    HALFBYTE_LANES r |= static_cast<uint32_t>(a.v[i] == 0.0f) << i;
    return r;
  }
  // b in the lanes of the mask, a elsewhere.
  static F where(uint32_t mask, F a, F b) {
    HALFBYTE_LANES a.v[i] = (mask >> i) & 1u ? b.v[i] : a.v[i];
    return a;
  }
  static F zero_where(uint32_t mask, F a) {
    HALFBYTE_LANES a.v[i] = (mask >> i) & 1u ? 0.0f : a.v[i];
    return a;
  }
  // One up where a negative code (one below `negative`) stands for s > 0, one down in the opposite case.
  static I nudge(I codes, F s, int negative) {
    HALFBYTE_LANES {
      const bool below = codes.v[i] < negative;
      codes.v[i] += below && s.v[i] > 0.0f && codes.v[i] < 255 ? 1 : 0;
      codes.v[i] -= !below && s.v[i] < 0.0f ? 1 : 0;
    }
    return codes;
  }
  static I load_bytes(const uint8_t* p) {
    I r;
    HALFBYTE_LANES r.v[i] = p[i];
    return r;
  }
  static void store_bytes(uint8_t* p, I a) { HALFBYTE_LANES p[i] = static_cast<uint8_t>(a.v[i]); }
  // rint(a) clamped to +-127, NaN as 0.
  static I to_int8(F a) {
    I r;
    HALFBYTE_LANES {
      float x = a.v[i];
      x = x > 127.0f ? 127.0f : x;
      x = x < -127.0f ? -127.0f : x;
      x = x == x ? x : 0.0f;
      // 1.5 * 2^23 leaves the integer, rounded to even, in the low mantissa bits.
      r.v[i] = static_cast<int32_t>(as_bits(x + 12582912.0f) - 0x4b400000u);
    }
    return r;
  }

  // ---- 4-bit encode
  static I nf4(F s) {
    I r;
    HALFBYTE_LANES {
      int32_t code = 0;
      for (int j = 0; j < 15; ++j) code += s.v[i] > as_float(nf4_threshold_bits[j]);
      r.v[i] = code;
    }
    return r;
  }
  static I fp4(F s) {
    I r;
    HALFBYTE_LANES {
      int32_t index = 0;
      for (int j = 0; j < 7; ++j) index += __builtin_fabsf(s.v[i]) > as_float(fp4_threshold_bits[j]);
      r.v[i] = fp4_order[index] + (s.v[i] < 0.0f ? 8 : 0);
    }
    return r;
  }
  static void pack_nibbles(uint8_t* out, I codes) {
    for (int i = 0; i < W / 2; ++i) out[i] = static_cast<uint8_t>(codes.v[2 * i] << 4 | codes.v[2 * i + 1]);
  }

  // ---- 4-bit decode, natural order: `count` (a multiple of 32) values of one block
  template <bool kStream, class T>
  static void decode_run(const uint8_t* packed, int64_t count, const T* table, T* out) {
    for (int64_t i = 0; i < count / 2; ++i) {
      write(out + 2 * i, table[packed[i] >> 4]);
      write(out + 2 * i + 1, table[packed[i] & 15]);
    }
  }

  // ---- 4-bit decode, split order: see linear4.h
  struct Levels {
    const float* table;
  };
  struct Nibbles {
    uint8_t v[4 * W];
  };
  static Levels levels(const float* table) { return {table}; }
  static Nibbles nibbles(const uint8_t* p) {
    Nibbles r;
    memcpy(r.v, p, sizeof r.v);
    return r;
  }
  template <int s>
  static F level(const Levels& levels, const Nibbles& n) {
    F r;
    HALFBYTE_LANES r.v[i] = levels.table[(n.v[4 * i + s / 2] >> (4 * (s & 1))) & 15];
    return r;
  }
  static I scale_index(int64_t rest, int log2_blocksize) {
    I r;
    HALFBYTE_LANES r.v[i] = static_cast<int32_t>((rest + 8 * i) >> log2_blocksize);
    return r;
  }
  using Mask = int;
  static Mask first_lanes(int count) { return count; }
  // absmax[index] where index < count, else 0.
  static F scales(const float* absmax, Mask count, I index) {
    F r;
    HALFBYTE_LANES r.v[i] = index.v[i] < count ? read<float>(absmax + index.v[i]) : 0.0f;
    return r;
  }
  static void split(const float* x, float* out) {
    for (int s = 0; s < 8; ++s) HALFBYTE_LANES out[s * W + i] = x[8 * i + (s ^ 1)];
  }

  // ---- 8-bit codes: see eightbit.h for the entries of `table`
  static I encode8(F s, const uint32_t* table) {
    I r;
    HALFBYTE_LANES {
      const uint32_t bits = as_bits(s.v[i]);
      const uint32_t ordered = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
      const uint32_t entry = table[ordered >> 16];
      r.v[i] = static_cast<int32_t>((entry >> 16) + ((ordered & 0xffffu) > (entry & 0xffffu)));
    }
    return r;
  }
  struct Book {
    const float* values;
  };
  static Book book(const float* values) { return {values}; }
  static void lookup(const Book& book, const uint8_t* codes, F* first, F* second) {
    HALFBYTE_LANES first->v[i] = read<float>(book.values + codes[i]);
    HALFBYTE_LANES second->v[i] = read<float>(book.values + codes[W + i]);
  }
#undef HALFBYTE_LANES
};

}  // namespace
}  // namespace halfbyte::cpu
