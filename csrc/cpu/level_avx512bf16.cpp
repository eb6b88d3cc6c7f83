// level_avx512bf16.cpp: the 4-bit linear layer on bf16 activations with vdpbf16ps.
//
// Layout    a group is 128 elements, 32 words of 16 bits; nibble s of word w is element 4 w + (s ^ 1). vpermw
//           looks a nibble up by five index bits in a table that stands twice, so nothing is masked; the
//           pairs of words that vdpbf16ps adds up stay inside a 32-bit lane, whose eight elements share one
//           absmax.
// Agrees    few rows of x: levels are rounded to bf16, at a common scale chosen so that their errors cancel
//           (below), and absmax stays fp32.  More rows: each weight level * absmax is rounded to bf16 once,
//           as the reference.
#include "levels.h"
#include "vec_avx512.h"
#include "backward4.h"
#include "int8.h"
#include "linear4.h"

namespace halfbyte::cpu {
namespace {

// NF4 levels times kNf4Scale, each rounded up or down such that over the codes of Gaussian weights (block
// sizes 32 to 1024) the errors' mean is below 6e-6 of absmax: plain rounding leaves 2e-4, which an activation
// with a mean adds up coherently.  Their root mean square, relative to the weights, is 1.0e-3 against 1.3e-3.
constexpr float kNf4Scale = 1.772175f;
alignas(32) constexpr uint16_t nf4_bfloat[16] = {0xbfe3, 0xbf9e, 0xbf6e, 0xbf33, 0xbf01, 0xbea8,
                                                 0xbe25, 0x0000, 0x3e10, 0x3e92, 0x3ee0, 0x3f19,
                                                 0x3f48, 0x3f7f, 0x3fa4, 0x3fe3};
// FP4 levels times 12 are exact in bf16: 0, 1 / 16, 8, 12, 4, 6, 2, 3 and their negatives.
alignas(32) constexpr uint16_t fp4_bfloat[16] = {0x0000, 0x3d80, 0x4100, 0x4140, 0x4080, 0x40c0,
                                                 0x4000, 0x4040, 0x0000, 0xbd80, 0xc100, 0xc140,
                                                 0xc080, 0xc0c0, 0xc000, 0xc040};

HALFBYTE_INLINE __m512 dot_pairs(__m512 c, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

struct DotBf16 {
  using A = uint16_t;
  using B = uint16_t;
  using Sum = float;
  using Acc = __m512;
  using AV = __m512i;
  using BV = __m512i;
  static constexpr int kStep = 32;
  static constexpr int kRows = 6;
  static HALFBYTE_INLINE Acc zero() { return _mm512_setzero_ps(); }
  static HALFBYTE_INLINE AV load_a(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static HALFBYTE_INLINE BV load_b(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static HALFBYTE_INLINE Acc step(Acc c, AV a, BV b) { return dot_pairs(c, a, b); }
  static HALFBYTE_INLINE void add4(float* to, Acc a, Acc b, Acc c, Acc d) { Avx512::add4(to, a, b, c, d); }
};

struct SplitBf16 {
  using V = Avx512;
  using F = V::F;
  using Elem = uint16_t;
  using Dot = DotBf16;
  static constexpr int kLanes = 32, kParts = 4;
  static constexpr int64_t kSmall = 16;
  static constexpr int kSmallRows = 2;
  static constexpr int64_t group = 128;

  static HALFBYTE_INLINE __m512i levels_for(Format format) {
    return _mm512_broadcast_i64x4(V::load256(format == Format::nf4 ? nf4_bfloat : fp4_bfloat));
  }
  static HALFBYTE_INLINE float post_scale(Format format) {
    return 1.0f / (format == Format::nf4 ? kNf4Scale : 12.0f);
  }
  template <int s>
  static HALFBYTE_INLINE __m512i level(const __m512i& levels, const __m512i& nibbles) {
    return _mm512_permutexvar_epi16(s == 0 ? nibbles : _mm512_srli_epi16(nibbles, 4 * s), levels);
  }
  static HALFBYTE_INLINE F multiply(const __m512i& v, const uint16_t* x, const F& t) {
    return dot_pairs(t, v, _mm512_loadu_si512(x));
  }

  // 128 elements to split order: each register becomes four runs of eight words (s = 0 .. 3), then the runs
  // of four registers are transposed.
  static HALFBYTE_INLINE void split(const uint16_t* x, uint16_t* out) {
    const __m512i order = _mm512_set_epi16(30, 26, 22, 18, 14, 10, 6, 2, 31, 27, 23, 19, 15, 11, 7, 3, 28, 24,
                                           20, 16, 12, 8, 4, 0, 29, 25, 21, 17, 13, 9, 5, 1);
    __m512i r[4];
    for (int i = 0; i < 4; ++i) r[i] = _mm512_permutexvar_epi16(order, _mm512_loadu_si512(x + 32 * i));
    const __m512i a = _mm512_shuffle_i32x4(r[0], r[1], 0x44), b = _mm512_shuffle_i32x4(r[2], r[3], 0x44);
    const __m512i c = _mm512_shuffle_i32x4(r[0], r[1], 0xee), d = _mm512_shuffle_i32x4(r[2], r[3], 0xee);
    _mm512_storeu_si512(out, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_storeu_si512(out + 32, _mm512_shuffle_i32x4(a, b, 0xdd));
    _mm512_storeu_si512(out + 64, _mm512_shuffle_i32x4(c, d, 0x88));
    _mm512_storeu_si512(out + 96, _mm512_shuffle_i32x4(c, d, 0xdd));
  }
  static HALFBYTE_INLINE void split_panel(const BFloat* x, int64_t k, uint16_t* out, int64_t stride) {
    for (int64_t p = 0; p < k; p += group) {
      uint16_t part[group];
      if (k - p < group) {
        memset(part, 0, sizeof part);
        memcpy(part, x + p, static_cast<size_t>(k - p) * 2);
      }
      split(k - p < group ? part : reinterpret_cast<const uint16_t*>(x + p), out + p / group * stride);
    }
  }

  static HALFBYTE_INLINE __m512i products(__m512 levels, float a, float b) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_mul_ps(levels, _mm512_set1_ps(b)),
                                                         _mm512_mul_ps(levels, _mm512_set1_ps(a))));
  }
  // Groups of one, two or four blocks: a lookup among the products of each, the block's number above the
  // nibble.
  static HALFBYTE_INLINE void decode_group(const uint8_t* packed, const float* absmax, int blocks,
                                           __m512 levels, uint16_t* out) {
    const __m512i v = _mm512_loadu_si512(packed), nibble = _mm512_set1_epi16(15);
    const float first = read<float>(absmax);
    if (blocks == 1) {
      const __m512i t = products(levels, first, first);
      HALFBYTE_UNROLL
      for (int s = 0; s < 4; ++s) {
        _mm512_storeu_si512(out + 32 * s, _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 4 * s), t));
      }
      return;
    }
    const __m512i t = products(levels, first, read<float>(absmax + 1));
    if (blocks == 2) {
      const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
      HALFBYTE_UNROLL
      for (int s = 0; s < 4; ++s) {
        // 0xea: (a & b) | c
        const __m512i index = _mm512_ternarylogic_epi32(_mm512_srli_epi16(v, 4 * s), nibble, second, 0xea);
        _mm512_storeu_si512(out + 32 * s, _mm512_permutexvar_epi16(index, t));
      }
      return;
    }
    const __m512i t2 = products(levels, read<float>(absmax + 2), read<float>(absmax + 3));
    const __m512i number = _mm512_set_epi64(0x0030003000300030, 0x0030003000300030, 0x0020002000200020,
                                            0x0020002000200020, 0x0010001000100010, 0x0010001000100010, 0, 0);
    HALFBYTE_UNROLL
    for (int s = 0; s < 4; ++s) {
      const __m512i index = _mm512_ternarylogic_epi32(_mm512_srli_epi16(v, 4 * s), nibble, number, 0xea);
      _mm512_storeu_si512(out + 32 * s, _mm512_permutex2var_epi16(t, index, t2));
    }
  }

  static HALFBYTE_ALONE void decode_row(const Weight4& w, const float* absmax, int log2_blocksize,
                                        int64_t first, int64_t count, int64_t ahead, uint16_t* out,
                                        int64_t size) {
    const int64_t first_block = first >> log2_blocksize;
    const int blocks = log2_blocksize >= 7 ? 1 : 1 << (7 - log2_blocksize);
    const __m512 levels = V::load(levels_of(w.format));
    int64_t p = 0;
    if (first % min64(group, w.blocksize) == 0) {  // no block begins inside a lane's or a lookup's share
      for (; p + group <= count; p += group) {
        const int64_t e = first + p;
        if (log2_blocksize >= 7 && (e & (w.blocksize - 1)) + group > w.blocksize) break;
        __builtin_prefetch(w.packed + e / 2 + ahead);
        decode_group(w.packed + e / 2, absmax + ((e >> log2_blocksize) - first_block), blocks, levels,
                     out + p);
      }
    }
    for (; p < size; p += group) {
      alignas(64) BFloat natural[group] = {};
      if (p < count) {
        decode_flat<V, false>(w.packed, absmax + (((first + p) >> log2_blocksize) - first_block),
                              levels_of(w.format), log2_blocksize, first + p, min64(group, count - p),
                              natural);
      }
      split(reinterpret_cast<const uint16_t*>(natural), out + p);
    }
  }
};

const char* linear_4bit_bf16(const void* x, DType dtype, Weight4 weight, const void* bias, int64_t m,
                             int64_t n, int64_t k, void* y, int threads) {
  if (dtype != DType::bfloat16) return "avx512bf16 takes bfloat16 only";
  return linear4<SplitBf16>(static_cast<const BFloat*>(x), weight, static_cast<const BFloat*>(bias), m, n, k,
                            static_cast<BFloat*>(y), threads);
}

// The gradient: two weight rows, element by element side by side, are one register of pairs along n.
struct OuterBf16 {
  using V = Avx512;
  using Elem = uint16_t;
  static constexpr int64_t kDepth = 128, kSlab = 512, kPack = 2;
  static constexpr int64_t kColumns = 64;

  static HALFBYTE_INLINE void panel_row(const BFloat* dy, int64_t n, uint16_t* out) {
    memcpy(out, dy, static_cast<size_t>(n) * 2);
    if (n % 2 != 0) out[n] = 0;
  }
  // tile[pair of rows][column][row of the pair]; an odd last row is paired with zeros.
  static HALFBYTE_INLINE void decode(const Weight4& w, int log2_blocksize, int64_t k, int64_t row,
                                     int64_t rows, int64_t column, int64_t columns, int64_t width,
                                     uint16_t* tile) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7,
                                         38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    float buffer[kSlab / 32 + 2];
    alignas(64) BFloat pair[2][kSlab];
    for (int64_t r = 0; r < rows; r += 2) {
      for (int64_t q = 0; q < 2; ++q) {
        memset(pair[q] + columns, 0, static_cast<size_t>(width - columns) * 2);
        if (r + q >= rows) {
          memset(pair[q], 0, static_cast<size_t>(columns) * 2);
          continue;
        }
        const int64_t first = (row + r + q) * k + column;
        const auto [block, blocks] = blocks_of(first, columns, log2_blocksize);
        decode_flat<V, false>(w.packed, absmax_range(w.absmax, block, blocks, buffer), levels_of(w.format),
                              log2_blocksize, first, columns, pair[q]);
      }
      uint16_t* out = tile + r * width;
      for (int64_t j = 0; j < width; j += 32) {
        const __m512i a = _mm512_loadu_si512(pair[0] + j), b = _mm512_loadu_si512(pair[1] + j);
        _mm512_storeu_si512(out + 2 * j, _mm512_permutex2var_epi16(a, low, b));
        _mm512_storeu_si512(out + 2 * j + 32, _mm512_permutex2var_epi16(a, high, b));
      }
    }
  }
  template <int kM>
  static HALFBYTE_ALONE void block(const uint16_t* dy, int64_t ldy, int64_t depth, const uint16_t* tile,
                                   int64_t ldt, float* sums, int64_t lds) {
    __m512 acc[kM][4];
    HALFBYTE_UNROLL
    for (int i = 0; i < kM; ++i) {
      HALFBYTE_UNROLL
      for (int j = 0; j < 4; ++j) acc[i][j] = V::set1(0.0f);
    }
    for (int64_t p = 0; p < depth; p += 2) {
      __m512i b[4];
      HALFBYTE_UNROLL
      for (int j = 0; j < 4; ++j) b[j] = _mm512_loadu_si512(tile + p * ldt + 32 * j);
      HALFBYTE_UNROLL
      for (int i = 0; i < kM; ++i) {
        int32_t two;
        memcpy(&two, dy + i * ldy + p, 4);
        const __m512i a = _mm512_set1_epi32(two);
        HALFBYTE_UNROLL
        for (int j = 0; j < 4; ++j) acc[i][j] = dot_pairs(acc[i][j], a, b[j]);
      }
    }
    HALFBYTE_UNROLL
    for (int i = 0; i < kM; ++i) {
      HALFBYTE_UNROLL
      for (int j = 0; j < 4; ++j) {
        float* to = sums + i * lds + 16 * j;  // in one go, so that roundings do not pile up over all of n
        V::store(to, V::add(V::load(to), acc[i][j]));
      }
    }
  }
};

const char* linear_4bit_backward_bf16(const void* dy, DType dtype, Weight4 weight, int64_t m, int64_t n,
                                      int64_t k, void* dx, int threads) {
  if (dtype != DType::bfloat16) return "avx512bf16 takes bfloat16 only";
  return backward4<OuterBf16>(static_cast<const BFloat*>(dy), weight, m, n, k, static_cast<BFloat*>(dx),
                              threads);
}

}  // namespace

const Level level_avx512bf16 = {
    "avx512bf16", nullptr, nullptr, linear_4bit_bf16, linear_4bit_backward_bf16,
    nullptr,      nullptr, nullptr, nullptr,          nullptr,
    nullptr,      nullptr, nullptr,
};

}  // namespace halfbyte::cpu
