// vec_avx2.h: eight fp32 lanes of AVX2 with FMA and F16C.  The interface is that of vec_plain.h.
#pragma once
#include <immintrin.h>

#include "prelude.h"

namespace halfbyte::cpu {
namespace {

struct Avx2 {
  static constexpr int W = 8;
  static constexpr int kRows = 3, kColumns = 4, kSmall = 4, kSmallRows = 1;
  using F = __m256;
  using I = __m256i;

  static HALFBYTE_INLINE __m128i load128(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
  }
  static HALFBYTE_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  static HALFBYTE_INLINE F load(const Half* p) { return _mm256_cvtph_ps(load128(p)); }
  static HALFBYTE_INLINE F load(const BFloat* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16));
  }
  static HALFBYTE_INLINE __m128i narrow16(const Half*, F a) {
    return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT);
  }
  static HALFBYTE_INLINE __m128i narrow16(const BFloat*, F a) {
    const I u = _mm256_castps_si256(a);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    I r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    const I nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  }
  static HALFBYTE_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  template <class T>
  static HALFBYTE_INLINE void store(T* p, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow16(p, a));
  }
  static HALFBYTE_INLINE void stream(float* p, F a) { _mm256_stream_ps(p, a); }
  template <class T>
  static HALFBYTE_INLINE void stream(T* p, F a) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow16(p, a));
  }
  static HALFBYTE_INLINE void fence() { _mm_sfence(); }
  static HALFBYTE_INLINE F from_int(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static HALFBYTE_INLINE F from_int(const int32_t* p) {
    return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static HALFBYTE_INLINE F set1(float x) { return _mm256_set1_ps(x); }
  static HALFBYTE_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static HALFBYTE_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  static HALFBYTE_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static HALFBYTE_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
  static HALFBYTE_INLINE F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static HALFBYTE_INLINE F sign(F a) {
    const F one = _mm256_or_ps(_mm256_and_ps(a, set1(-0.0f)), set1(1.0f));
    return _mm256_blendv_ps(_mm256_add_ps(a, _mm256_setzero_ps()), one,
                            _mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_NEQ_OQ));
  }
  static HALFBYTE_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static HALFBYTE_INLINE F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  // maxps returns its second operand where either is NaN.
  static HALFBYTE_INLINE F max_keep(F keep, F x) { return _mm256_max_ps(x, keep); }
  static HALFBYTE_INLINE float hmax(F a) {
    __m128 r = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    r = _mm_max_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_max_ss(r, _mm_movehdup_ps(r)));
  }
  static HALFBYTE_INLINE float hsum(F a) {
    __m128 r = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    r = _mm_add_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
  }
  // to[0 .. 3] += the lane sums of a, b, c, d.
  static HALFBYTE_INLINE void add4(float* to, F a, F b, F c, F d) {
    const F r = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), sums));
  }
  static HALFBYTE_INLINE uint32_t mask_ge(F a, F b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
  }
  static HALFBYTE_INLINE uint32_t mask_finite(F a) {
    const F infinity = _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000));
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(abs(a), infinity, _CMP_LT_OQ)));
  }
  static HALFBYTE_INLINE uint32_t mask_zero(F a) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_EQ_OQ)));
  }
  static HALFBYTE_INLINE F where(uint32_t mask, F a, F b) {
    const I bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const I hit = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bit), bit);
    return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(hit));
  }
  static HALFBYTE_INLINE F zero_where(uint32_t mask, F a) {
    const I bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const I hit = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bit), bit);
    return _mm256_andnot_ps(_mm256_castsi256_ps(hit), a);
  }
  static HALFBYTE_INLINE I nudge(I codes, F s, int negative) {
    const F zero = _mm256_setzero_ps();
    const I below = _mm256_cmpgt_epi32(_mm256_set1_epi32(negative), codes);
    const I above_zero = _mm256_castps_si256(_mm256_cmp_ps(s, zero, _CMP_GT_OQ));
    const I below_zero = _mm256_castps_si256(_mm256_cmp_ps(s, zero, _CMP_LT_OQ));
    const I up = _mm256_and_si256(below, above_zero), down = _mm256_andnot_si256(below, below_zero);
    return _mm256_min_epi32(_mm256_add_epi32(_mm256_sub_epi32(codes, up), down), _mm256_set1_epi32(255));
  }
  static HALFBYTE_INLINE I load_bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static HALFBYTE_INLINE void store_bytes(uint8_t* p, I a) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const I low = _mm256_castsi128_si256(_mm_and_si128(words, _mm_set1_epi16(0xff)));
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(low), _mm256_castsi256_si128(low));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
  }
  static HALFBYTE_INLINE I to_int8(F a) {
    // minps and maxps return their second operand for NaN, so mask NaN away first.
    a = _mm256_and_ps(a, _mm256_cmp_ps(a, a, _CMP_ORD_Q));
    a = _mm256_max_ps(_mm256_min_ps(a, _mm256_set1_ps(127.0f)), _mm256_set1_ps(-127.0f));
    return _mm256_cvtps_epi32(a);
  }

  // ---- 4-bit encode: a binary search whose pivots are looked up by the bits found so far
  static HALFBYTE_INLINE F bits8(const uint32_t* t, int a, int b, int c, int d, int e, int f, int g, int h) {
    return _mm256_castsi256_ps(_mm256_setr_epi32(
        static_cast<int>(t[a]), static_cast<int>(t[b]), static_cast<int>(t[c]), static_cast<int>(t[d]),
        static_cast<int>(t[e]), static_cast<int>(t[f]), static_cast<int>(t[g]), static_cast<int>(t[h])));
  }
  // index * 2 + (s > pivot[index])
  static HALFBYTE_INLINE I descend(I index, F s, F pivots) {
    const F pivot = _mm256_permutevar8x32_ps(pivots, index);
    const I above = _mm256_castps_si256(_mm256_cmp_ps(s, pivot, _CMP_GT_OQ));
    return _mm256_sub_epi32(_mm256_add_epi32(index, index), above);
  }
  static HALFBYTE_INLINE I nf4(F s) {
    const uint32_t* t = nf4_threshold_bits;
    I index = descend(_mm256_setzero_si256(), s, bits8(t, 7, 7, 7, 7, 7, 7, 7, 7));
    index = descend(index, s, bits8(t, 3, 11, 3, 3, 3, 3, 3, 3));
    index = descend(index, s, bits8(t, 1, 5, 9, 13, 1, 1, 1, 1));
    return descend(index, s, bits8(t, 0, 2, 4, 6, 8, 10, 12, 14));
  }
  static HALFBYTE_INLINE I fp4(F s) {
    const uint32_t* t = fp4_threshold_bits;
    const F a = abs(s);
    I index = descend(_mm256_setzero_si256(), a, bits8(t, 3, 3, 3, 3, 3, 3, 3, 3));
    index = descend(index, a, bits8(t, 1, 5, 1, 1, 1, 1, 1, 1));
    index = descend(index, a, bits8(t, 0, 2, 4, 6, 0, 0, 0, 0));
    const uint8_t* c = fp4_order;
    const I code =
        _mm256_permutevar8x32_epi32(_mm256_setr_epi32(c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]), index);
    const I negative = _mm256_castps_si256(_mm256_cmp_ps(s, _mm256_setzero_ps(), _CMP_LT_OQ));
    return _mm256_or_si256(code, _mm256_and_si256(negative, _mm256_set1_epi32(8)));
  }
  static HALFBYTE_INLINE void pack_nibbles(uint8_t* out, I codes) {
    // Low byte of each 64-bit lane: even code << 4 | odd code.
    const I pairs = _mm256_or_si256(_mm256_slli_epi32(codes, 4), _mm256_srli_epi64(codes, 32));
    const I low = _mm256_shuffle_epi8(pairs, _mm256_set1_epi64x(0x0808080808080800));
    const uint32_t first = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm256_castsi256_si128(low)));
    const uint32_t second = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm256_extracti128_si256(low, 1)));
    const uint32_t four = (first & 0xffffu) | second << 16;
    memcpy(out, &four, 4);
  }

  // ---- 4-bit decode, natural order
  template <bool kStream>
  static HALFBYTE_INLINE void decode_run(const uint8_t* packed, int64_t count, const float* table,
                                         float* out) {
    const Levels t = levels(table);
    const I shift = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    for (int64_t i = 0; i < count; i += 8) {
      int32_t four;
      memcpy(&four, packed + i / 2, 4);
      const F v = pick(t, _mm256_srlv_epi32(_mm256_set1_epi32(four), shift));
      if (kStream) {
        stream(out + i, v);
      } else {
        store(out + i, v);
      }
    }
  }
  // 16-bit values: one byte table for each half of them.
  template <bool kStream, class T>
  static HALFBYTE_INLINE void decode_run(const uint8_t* packed, int64_t count, const T* table, T* out) {
    const __m128i a = load128(table), b = load128(table + 8), byte = _mm_set1_epi16(0xff);
    const I low_bytes =
        _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte)));
    const I high_bytes =
        _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
    const __m128i nibble = _mm_set1_epi8(15);
    for (int64_t i = 0; i < count; i += 32) {
      const __m128i v = load128(packed + i / 2);
      const __m128i even = _mm_and_si128(_mm_srli_epi16(v, 4), nibble), odd = _mm_and_si128(v, nibble);
      const I codes = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
      const I low = _mm256_shuffle_epi8(low_bytes, codes), high = _mm256_shuffle_epi8(high_bytes, codes);
      const I first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
      I* to = reinterpret_cast<I*>(out + i);
      const I v0 = _mm256_permute2x128_si256(first, second, 0x20);
      const I v1 = _mm256_permute2x128_si256(first, second, 0x31);
      if (kStream) {
        _mm256_stream_si256(to, v0);
        _mm256_stream_si256(to + 1, v1);
      } else {
        _mm256_storeu_si256(to, v0);
        _mm256_storeu_si256(to + 1, v1);
      }
    }
  }

  // ---- 4-bit decode, split order
  struct Levels {
    F low, high;
  };
  using Nibbles = I;
  static HALFBYTE_INLINE Levels levels(const float* table) { return {load(table), load(table + 8)}; }
  static HALFBYTE_INLINE Nibbles nibbles(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  // The level of the low four bits of each lane; the bits above do not matter.
  static HALFBYTE_INLINE F pick(const Levels& t, I index) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
  template <int s>
  static HALFBYTE_INLINE F level(const Levels& t, const Nibbles& n) {
    return pick(t, _mm256_srli_epi32(n, 4 * s));
  }
  static HALFBYTE_INLINE I scale_index(int64_t rest, int log2_blocksize) {
    const I position = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(rest)),
                                        _mm256_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56));
    return _mm256_srl_epi32(position, _mm_cvtsi32_si128(log2_blocksize));
  }
  using Mask = I;
  static HALFBYTE_INLINE Mask first_lanes(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static HALFBYTE_INLINE F scales(const float* absmax, Mask mask, I index) {
    return _mm256_permutevar8x32_ps(_mm256_maskload_ps(absmax, mask), index);
  }
  static HALFBYTE_INLINE void split(const float* x, float* out) {
    const I stride = _mm256_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56);
    for (int s = 0; s < 8; ++s) _mm256_storeu_ps(out + s * W, _mm256_i32gather_ps(x + (s ^ 1), stride, 4));
  }

  // ---- 8-bit codes
  static HALFBYTE_INLINE I encode8(F s, const uint32_t* table) {
    const I bits = _mm256_castps_si256(s);
    const I flip =
        _mm256_or_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(static_cast<int>(0x80000000u)));
    const I ordered = _mm256_xor_si256(bits, flip), low = _mm256_set1_epi32(0xffff);
    const I entry =
        _mm256_i32gather_epi32(reinterpret_cast<const int*>(table), _mm256_srli_epi32(ordered, 16), 4);
    const I above = _mm256_cmpgt_epi32(_mm256_and_si256(ordered, low), _mm256_and_si256(entry, low));
    return _mm256_sub_epi32(_mm256_srli_epi32(entry, 16), above);
  }
  struct Book {
    const float* values;
  };
  static HALFBYTE_INLINE Book book(const float* values) { return {values}; }
  static HALFBYTE_INLINE void lookup(const Book& book, const uint8_t* codes, F* first, F* second) {
    *first = look(book, codes);
    *second = look(book, codes + W);
  }
  static HALFBYTE_INLINE F look(const Book& book, const uint8_t* codes) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    return _mm256_i32gather_ps(book.values, _mm256_cvtepu8_epi32(eight), 4);
  }
};

}  // namespace
}  // namespace halfbyte::cpu
