// level_avx2.cpp: every op with AVX2, FMA and F16C.
#include "levels.h"
#include "vec_avx2.h"
#include "backward4.h"
#include "eightbit.h"
#include "int8.h"
#include "optimizer.h"

namespace halfbyte::cpu {
namespace {

// int8 products through 16 bits: vpmaddwd is exact.
struct DotTile {
  using A = int16_t;
  using B = int16_t;
  using Sum = int32_t;
  using Acc = __m256i;
  using AV = __m256i;
  using BV = __m256i;
  static constexpr int kStep = 16;
  static constexpr int kRows = 2;
  static HALFBYTE_INLINE Acc zero() { return _mm256_setzero_si256(); }
  static HALFBYTE_INLINE AV load_a(const int16_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static HALFBYTE_INLINE BV load_b(const int16_t* p) { return load_a(p); }
  static HALFBYTE_INLINE Acc step(Acc c, AV a, BV b) { return _mm256_add_epi32(c, _mm256_madd_epi16(a, b)); }
  static HALFBYTE_INLINE void add4(int32_t* to, Acc a, Acc b, Acc c, Acc d) {
    const __m256i r = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
    __m128i* p = reinterpret_cast<__m128i*>(to);
    _mm_storeu_si128(p, _mm_add_epi32(_mm_loadu_si128(p), sums));
  }
  static HALFBYTE_INLINE int32_t prepare(const int8_t* q, int64_t k, int64_t padded, int16_t* out) {
    for (int64_t i = 0; i < k; ++i) out[i] = q[i];
    for (int64_t i = k; i < padded; ++i) out[i] = 0;
    return 0;
  }
  // A weight row for a tile, widened and padded.
  static HALFBYTE_INLINE void copy_row(const int8_t* q, int64_t count, int64_t ahead, int16_t* out,
                                       int64_t size) {
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) {
      __builtin_prefetch(q + i + ahead);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_cvtepi8_epi16(Avx2::load128(q + i)));
    }
    for (; i < size; ++i) out[i] = i < count ? q[i] : int16_t{0};
  }
};

// Straight from the weight.
struct DotInt8 : DotTile {
  using B = int8_t;
  using Tile = DotTile;
  static HALFBYTE_INLINE BV load_b(const int8_t* p) { return _mm256_cvtepi8_epi16(Avx2::load128(p)); }
};

}  // namespace

const Level level_avx2 = {
    "avx2",
    quantize_4bit<Avx2>,
    dequantize_4bit<Avx2>,
    linear_4bit<Avx2>,
    linear_4bit_backward<Avx2>,
    quantize_8bit<Avx2>,
    dequantize_8bit<Avx2>,
    quantize_int8_rows<Avx2>,
    dequantize_int8<Avx2>,
    matmul_int8<DotInt8>,
    linear_int8<Avx2, DotInt8>,
    update_32bit<Avx2>,
    update_8bit<Avx2>,
};

}  // namespace halfbyte::cpu
