// level_avx512.cpp: every op with AVX-512 F, BW, VL, DQ.
#include "levels.h"
#include "vec_avx512.h"
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
  using Acc = __m512i;
  using AV = __m512i;
  using BV = __m512i;
  static constexpr int kStep = 32;
  static constexpr int kRows = 4;
  static HALFBYTE_INLINE Acc zero() { return _mm512_setzero_si512(); }
  static HALFBYTE_INLINE AV load_a(const int16_t* p) { return _mm512_loadu_si512(p); }
  static HALFBYTE_INLINE BV load_b(const int16_t* p) { return load_a(p); }
  static HALFBYTE_INLINE Acc step(Acc c, AV a, BV b) { return _mm512_add_epi32(c, _mm512_madd_epi16(a, b)); }
  static HALFBYTE_INLINE void add4(int32_t* to, Acc a, Acc b, Acc c, Acc d) { Avx512::add4(to, a, b, c, d); }
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
      _mm512_storeu_si512(out + i, _mm512_cvtepi8_epi16(Avx512::load256(q + i)));
    }
    for (; i < size; ++i) out[i] = i < count ? q[i] : int16_t{0};
  }
};

// Straight from the weight.
struct DotInt8 : DotTile {
  using B = int8_t;
  using Tile = DotTile;
  static HALFBYTE_INLINE BV load_b(const int8_t* p) { return _mm512_cvtepi8_epi16(Avx512::load256(p)); }
};

}  // namespace

const Level level_avx512 = {
    "avx512",
    quantize_4bit<Avx512>,
    dequantize_4bit<Avx512>,
    linear_4bit<Avx512>,
    linear_4bit_backward<Avx512>,
    quantize_8bit<Avx512>,
    dequantize_8bit<Avx512>,
    quantize_int8_rows<Avx512>,
    dequantize_int8<Avx512>,
    matmul_int8<DotInt8>,
    linear_int8<Avx512, DotInt8>,
    update_32bit<Avx512>,
    update_8bit<Avx512>,
};

}  // namespace halfbyte::cpu
