// vec_avx512.h: sixteen fp32 lanes of AVX-512 F, BW, VL, DQ.  The interface is that of vec_plain.h.
#pragma once
#include <immintrin.h>

#include "prelude.h"

namespace halfbyte::cpu {
namespace {

struct Avx512 {
  static constexpr int W = 16;
  static constexpr int kRows = 6, kColumns = 4, kSmall = 16, kSmallRows = 2;
  using F = __m512;
  using I = __m512i;

  static HALFBYTE_INLINE __m256i load256(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static HALFBYTE_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static HALFBYTE_INLINE F load(const Half* p) { return _mm512_cvtph_ps(load256(p)); }
  static HALFBYTE_INLINE F load(const BFloat* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load256(p)), 16));
  }
  static HALFBYTE_INLINE __m256i narrow16(const Half*, F a) {
    return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT);
  }
  static HALFBYTE_INLINE __m256i narrow16(const BFloat*, F a) {
    // vcvtneps2bf16 would flush subnormals, so round by hand.
    const I u = _mm512_castps_si512(a);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    I r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(r);
  }
  static HALFBYTE_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  template <class T>
  static HALFBYTE_INLINE void store(T* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow16(p, a));
  }
  static HALFBYTE_INLINE void stream(float* p, F a) { _mm512_stream_ps(p, a); }
  template <class T>
  static HALFBYTE_INLINE void stream(T* p, F a) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow16(p, a));
  }
  static HALFBYTE_INLINE void fence() { _mm_sfence(); }
  static HALFBYTE_INLINE F from_int(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static HALFBYTE_INLINE F from_int(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
  static HALFBYTE_INLINE F set1(float x) { return _mm512_set1_ps(x); }
  static HALFBYTE_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static HALFBYTE_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static HALFBYTE_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static HALFBYTE_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  static HALFBYTE_INLINE F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static HALFBYTE_INLINE F sign(F a) {
    const F one = _mm512_or_ps(_mm512_and_ps(a, set1(-0.0f)), set1(1.0f));
    const F zero = _mm512_setzero_ps();
    return _mm512_mask_mov_ps(_mm512_add_ps(a, zero), _mm512_cmp_ps_mask(a, zero, _CMP_NEQ_OQ), one);
  }
  static HALFBYTE_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static HALFBYTE_INLINE F abs(F a) { return _mm512_abs_ps(a); }
  // maxps returns its second operand where either is NaN.
  static HALFBYTE_INLINE F max_keep(F keep, F x) { return _mm512_max_ps(x, keep); }
  static HALFBYTE_INLINE float hmax(F a) { return _mm512_reduce_max_ps(a); }
  static HALFBYTE_INLINE float hsum(F a) { return _mm512_reduce_add_ps(a); }
  // to[0 .. 3] += the lane sums of a, b, c, d.
  static HALFBYTE_INLINE void add4(float* to, F a, F b, F c, F d) {
    // Lane sums of pairs: after each step a vector holds twice as many numbers in half as many lanes each.
    const F ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const F cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const F r = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(r), _mm512_extractf32x8_ps(r, 1));
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), sums));
  }
  static HALFBYTE_INLINE void add4(int32_t* to, I a, I b, I c, I d) {
    const I ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const I cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const I r = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(r), _mm512_extracti64x4_epi64(r, 1));
    const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    __m128i* p = reinterpret_cast<__m128i*>(to);
    _mm_storeu_si128(p, _mm_add_epi32(_mm_loadu_si128(p), sums));
  }
  static HALFBYTE_INLINE uint32_t mask_ge(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static HALFBYTE_INLINE uint32_t mask_finite(F a) {
    const F infinity = _mm512_castsi512_ps(_mm512_set1_epi32(0x7f800000));
    return _mm512_cmp_ps_mask(abs(a), infinity, _CMP_LT_OQ);
  }
  static HALFBYTE_INLINE uint32_t mask_zero(F a) {
    return _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_EQ_OQ);
  }
  static HALFBYTE_INLINE F where(uint32_t mask, F a, F b) {
    return _mm512_mask_mov_ps(a, static_cast<__mmask16>(mask), b);
  }
  static HALFBYTE_INLINE F zero_where(uint32_t mask, F a) {
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(~mask), a);
  }
  static HALFBYTE_INLINE I nudge(I codes, F s, int negative) {
    const F zero = _mm512_setzero_ps();
    const I one = _mm512_set1_epi32(1);
    const __mmask16 below = _mm512_cmplt_epi32_mask(codes, _mm512_set1_epi32(negative));
    const __mmask16 up = _mm512_mask_cmp_ps_mask(below, s, zero, _CMP_GT_OQ);
    const __mmask16 down = _mm512_mask_cmp_ps_mask(static_cast<__mmask16>(~below), s, zero, _CMP_LT_OQ);
    codes = _mm512_mask_sub_epi32(_mm512_mask_add_epi32(codes, up, codes, one), down, codes, one);
    return _mm512_min_epi32(codes, _mm512_set1_epi32(255));
  }
  static HALFBYTE_INLINE I load_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static HALFBYTE_INLINE void store_bytes(uint8_t* p, I a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
  }
  static HALFBYTE_INLINE I to_int8(F a) {
    a = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, a, _CMP_ORD_Q), a);
    a = _mm512_max_ps(_mm512_min_ps(a, _mm512_set1_ps(127.0f)), _mm512_set1_ps(-127.0f));
    return _mm512_cvtps_epi32(a);
  }

  // ---- 4-bit encode: a binary search whose pivots are looked up by the bits found so far
  static HALFBYTE_INLINE I push(I index, __mmask16 above) {
    const I twice = _mm512_add_epi32(index, index);
    return _mm512_mask_add_epi32(twice, above, twice, _mm512_set1_epi32(1));
  }
  static HALFBYTE_INLINE I descend(I index, F s, F table) {
    return push(index, _mm512_cmp_ps_mask(s, _mm512_permutexvar_ps(index, table), _CMP_GT_OQ));
  }
  static HALFBYTE_INLINE F bits8(const uint32_t* t, int a, int b, int c, int d, int e, int f, int g, int h) {
    const I lanes = _mm512_setr_epi32(static_cast<int>(t[a]), static_cast<int>(t[b]), static_cast<int>(t[c]),
                                      static_cast<int>(t[d]), static_cast<int>(t[e]), static_cast<int>(t[f]),
                                      static_cast<int>(t[g]), static_cast<int>(t[h]), 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_castsi512_ps(lanes);
  }
  static HALFBYTE_INLINE I nf4(F s) {
    const uint32_t* t = nf4_threshold_bits;
    const __mmask16 top = _mm512_cmp_ps_mask(s, _mm512_set1_ps(as_float(t[7])), _CMP_GT_OQ);
    const F second =
        _mm512_mask_blend_ps(top, _mm512_set1_ps(as_float(t[3])), _mm512_set1_ps(as_float(t[11])));
    I index = push(_mm512_maskz_set1_epi32(top, 1), _mm512_cmp_ps_mask(s, second, _CMP_GT_OQ));
    index = descend(index, s, bits8(t, 1, 5, 9, 13, 1, 1, 1, 1));
    return descend(index, s, bits8(t, 0, 2, 4, 6, 8, 10, 12, 14));
  }
  static HALFBYTE_INLINE I fp4(F s) {
    const uint32_t* t = fp4_threshold_bits;
    const F a = abs(s);
    const __mmask16 top = _mm512_cmp_ps_mask(a, _mm512_set1_ps(as_float(t[3])), _CMP_GT_OQ);
    const F second =
        _mm512_mask_blend_ps(top, _mm512_set1_ps(as_float(t[1])), _mm512_set1_ps(as_float(t[5])));
    I index = push(_mm512_maskz_set1_epi32(top, 1), _mm512_cmp_ps_mask(a, second, _CMP_GT_OQ));
    index = descend(index, a, bits8(t, 0, 2, 4, 6, 0, 0, 0, 0));
    const uint8_t* c = fp4_order;
    const I codes = _mm512_setr_epi32(c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], 0, 0, 0, 0, 0, 0, 0, 0);
    const I code = _mm512_permutexvar_epi32(index, codes);
    const __mmask16 negative = _mm512_cmp_ps_mask(s, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mask_or_epi32(code, negative, code, _mm512_set1_epi32(8));
  }
  static HALFBYTE_INLINE void pack_nibbles(uint8_t* out, I codes) {
    // Low byte of each 64-bit lane: even code << 4 | odd code.
    const I pairs = _mm512_or_si512(_mm512_slli_epi32(codes, 4), _mm512_srli_epi64(codes, 32));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm512_cvtepi64_epi8(pairs));
  }

  // ---- 4-bit decode, natural order
  template <bool kStream>
  static HALFBYTE_INLINE void decode_run(const uint8_t* packed, int64_t count, const float* table,
                                         float* out) {
    const F t = load(table);
    // Lane i wants byte i / 2 in its low bits, then its high nibble (i even) or low nibble.
    const I first = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const I second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    const I shift = _mm512_set1_epi64(4);
    for (int64_t i = 0; i < count; i += 32) {
      const I v = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2)));
      const F a = _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_shuffle_epi8(v, first), shift), t);
      const F b = _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_shuffle_epi8(v, second), shift), t);
      if (kStream) {
        stream(out + i, a);
        stream(out + i + 16, b);
      } else {
        store(out + i, a);
        store(out + i + 16, b);
      }
    }
  }
  template <bool kStream, class T>
  static HALFBYTE_INLINE void decode_run(const uint8_t* packed, int64_t count, const T* table, T* out) {
    // vpermw reads five index bits: the table stands twice, so that the fifth does not matter.
    const I t = _mm512_broadcast_i64x4(load256(table));
    // Byte pair 2 j, 2 j + 1 of 128-bit lane l wants byte 4 l + j / 2.
    const I spread = _mm512_set_epi32(0x0f0f0f0f, 0x0e0e0e0e, 0x0d0d0d0d, 0x0c0c0c0c, 0x0b0b0b0b, 0x0a0a0a0a,
                                      0x09090909, 0x08080808, 0x07070707, 0x06060606, 0x05050505, 0x04040404,
                                      0x03030303, 0x02020202, 0x01010101, 0x00000000);
    const I shift = _mm512_set1_epi32(4);  // words alternate: high nibble, low nibble
    for (int64_t i = 0; i < count; i += 32) {
      const I v = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2)));
      const I r = _mm512_permutexvar_epi16(_mm512_srlv_epi16(_mm512_shuffle_epi8(v, spread), shift), t);
      if (kStream) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), r);
      } else {
        _mm512_storeu_si512(out + i, r);
      }
    }
  }

  // ---- 4-bit decode, split order
  using Levels = F;
  using Nibbles = I;
  static HALFBYTE_INLINE Levels levels(const float* table) { return load(table); }
  static HALFBYTE_INLINE Nibbles nibbles(const uint8_t* p) { return _mm512_loadu_si512(p); }
  template <int s>
  static HALFBYTE_INLINE F level(const Levels& t, const Nibbles& n) {
    return _mm512_permutexvar_ps(s == 0 ? n : _mm512_srli_epi32(n, 4 * s),
                                 t);  // reads four index bits: no mask
  }
  static HALFBYTE_INLINE I scale_index(int64_t rest, int log2_blocksize) {
    const I lanes = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
    const I position = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(rest)), lanes);
    return _mm512_srl_epi32(position, _mm_cvtsi32_si128(log2_blocksize));
  }
  using Mask = __mmask16;
  static HALFBYTE_INLINE Mask first_lanes(int count) { return static_cast<Mask>((1u << count) - 1u); }
  static HALFBYTE_INLINE F scales(const float* absmax, Mask mask, I index) {
    return _mm512_permutexvar_ps(index, _mm512_maskz_loadu_ps(mask, absmax));
  }
  static HALFBYTE_INLINE void split(const float* x, float* out) {
    const I stride = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
    for (int s = 0; s < 8; ++s) _mm512_storeu_ps(out + s * W, _mm512_i32gather_ps(stride, x + (s ^ 1), 4));
  }

  // ---- 8-bit codes
  static HALFBYTE_INLINE I encode8(F s, const uint32_t* table) {
    const I bits = _mm512_castps_si512(s), low = _mm512_set1_epi32(0xffff);
    const I flip =
        _mm512_or_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(static_cast<int>(0x80000000u)));
    const I ordered = _mm512_xor_si512(bits, flip);
    const I entry = _mm512_i32gather_epi32(_mm512_srli_epi32(ordered, 16), table, 4);
    const __mmask16 above =
        _mm512_cmpgt_epu32_mask(_mm512_and_si512(ordered, low), _mm512_and_si512(entry, low));
    const I code = _mm512_srli_epi32(entry, 16);
    return _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(1));
  }
  // The whole codebook in sixteen registers, the upper and lower halves of its floats apart: vpermi2w looks 32
  // words up where a lookup of floats does 16.
  struct Book {
    I low[8], high[8];
  };
  static HALFBYTE_INLINE Book book(const float* values) {
    const I even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28,
                                    26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const I odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    Book r;
    HALFBYTE_UNROLL
    for (int i = 0; i < 8; ++i) {
      const I a = _mm512_loadu_si512(values + 32 * i), b = _mm512_loadu_si512(values + 32 * i + 16);
      r.low[i] = _mm512_permutex2var_epi16(a, even, b);
      r.high[i] = _mm512_permutex2var_epi16(a, odd, b);
    }
    return r;
  }
  static HALFBYTE_INLINE I pick(const I* part, I index, __mmask32 bit6, __mmask32 bit7) {
    const I a = _mm512_permutex2var_epi16(part[0], index, part[1]);
    const I b = _mm512_permutex2var_epi16(part[2], index, part[3]);
    const I c = _mm512_permutex2var_epi16(part[4], index, part[5]);
    const I d = _mm512_permutex2var_epi16(part[6], index, part[7]);
    return _mm512_mask_blend_epi16(bit7, _mm512_mask_blend_epi16(bit6, a, b),
                                   _mm512_mask_blend_epi16(bit6, c, d));
  }
  // The levels of 2 W codes.
  static HALFBYTE_INLINE void lookup(const Book& book, const uint8_t* codes, F* first, F* second) {
    // In fours, such that unpacking within 128-bit lanes ends in natural order.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const I index = _mm512_cvtepu8_epi16(_mm256_permutevar8x32_epi32(load256(codes), order));
    const __mmask32 bit6 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(0x40));
    const __mmask32 bit7 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(0x80));
    const I low = pick(book.low, index, bit6, bit7), high = pick(book.high, index, bit6, bit7);
    *first = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high));
    *second = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high));
  }
};

}  // namespace
}  // namespace halfbyte::cpu
