// level_avx512vnni.cpp: the integer product with AVX-512 VNNI.
#include "levels.h"
#include "vec_avx512.h"
#include "int8.h"

namespace halfbyte::cpu {
namespace {

// vpdpbusd multiplies unsigned by signed bytes.  The weight is the unsigned side, b + 128 (one exclusive or),
// and what that adds, 128 * sum(a), is known from a's row alone: the weight needs no second pass and no copy.
// Sums wrap modulo 2^32 and end exact.
struct DotTile {
  using A = int8_t;
  using B = int8_t;
  using Sum = int32_t;
  using Acc = __m512i;
  using AV = __m512i;
  using BV = __m512i;
  static constexpr int kStep = 64;
  static constexpr int kRows = 6;
  static HALFBYTE_INLINE Acc zero() { return _mm512_setzero_si512(); }
  static HALFBYTE_INLINE AV load_a(const int8_t* p) { return _mm512_loadu_si512(p); }
  static HALFBYTE_INLINE BV load_b(const int8_t* p) { return _mm512_loadu_si512(p); }
  // Not the intrinsic: GCC 12 keeps its accumulators in memory (its type is not the register's), at half the
  // speed.
  static HALFBYTE_INLINE Acc step(Acc c, AV a, BV b) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(b), "v"(a));
    return c;
  }
  static HALFBYTE_INLINE void add4(int32_t* to, Acc a, Acc b, Acc c, Acc d) { Avx512::add4(to, a, b, c, d); }
  // A weight row for a tile: b + 128, padded.
  static HALFBYTE_INLINE void copy_row(const int8_t* q, int64_t count, int64_t ahead, int8_t* out,
                                       int64_t size) {
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
    int64_t i = 0;
    for (; i + 64 <= count; i += 64) {
      __builtin_prefetch(q + i + ahead);
      _mm512_storeu_si512(out + i, _mm512_xor_si512(_mm512_loadu_si512(q + i), flip));
    }
    for (; i < size; ++i) out[i] = i < count ? static_cast<int8_t>(q[i] ^ 0x80) : int8_t{0};
  }
  static HALFBYTE_INLINE int32_t prepare(const int8_t* q, int64_t k, int64_t padded, int8_t* out) {
    memcpy(out, q, static_cast<size_t>(k));
    memset(out + k, 0, static_cast<size_t>(padded - k));
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < padded; i += 64)
      sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(out + i));
    return static_cast<int32_t>(-128u * static_cast<uint32_t>(_mm512_reduce_add_epi32(sum)));
  }
};

// Straight from the weight.
struct DotInt8 : DotTile {
  using Tile = DotTile;
  static HALFBYTE_INLINE BV load_b(const int8_t* p) {
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(static_cast<char>(0x80)));
  }
};

}  // namespace

const Level level_avx512vnni = {
    "avx512vnni",
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    matmul_int8<DotInt8>,
    linear_int8<Avx512, DotInt8>,
    nullptr,
    nullptr,
};

}  // namespace halfbyte::cpu
