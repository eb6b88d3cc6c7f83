// linear4.h: y = x @ W^T + bias over a packed 4-bit weight, and its gradient dx = dy @ W.
//
// Layout    split order: a group is 8 V::W (128 or 64) elements, one register of packed bytes.  Its 32-bit
//           lane i holds elements 8 i .. 8 i + 7, nibble s (bits 4 s ..) being element 8 i + (s ^ 1), because
//           the earlier code of a byte is the high one.  So shifting by 4 s and looking up gives a vector of
//           levels without unpacking, and x is permuted once into the same order (V::split).  Blocks are
//           multiples of 32, so a lane has one absmax if the row starts at a multiple of 8.
// Work      up to P::kSmall rows of x: every weight row is decoded in registers, absmax applied to each
//           group's sum. Above, or where rows start elsewhere (K % 8 != 0): tiles are decoded and multiplied
//           by dot.h.
// Bound by  memory for one row of x (0.5 byte + 4 / blocksize per weight), the multipliers above.
// Agrees    within rounding of the sums; sums are fp32 and rounded to x's type once.
// P         names the arithmetic: Elem and Dot, kSmall, kSmallRows, kLanes elements a register, kParts
//           registers a group, levels_for, post_scale, level<s>, multiply, split_panel, decode_tile.
#pragma once
#include "dot.h"
#include "fourbit.h"

namespace halfbyte::cpu {
namespace {

// Scales of the group at flat element e of a row whose blocks start at absmax[0] = block `first_block`.
template <class V>
HALFBYTE_INLINE typename V::F group_scales(const float* absmax, int64_t first_block, int log2_blocksize,
                                           int64_t e, int64_t size) {
  const int64_t rest = e & ((int64_t{1} << log2_blocksize) - 1);
  const int count = static_cast<int>(((rest + size - 1) >> log2_blocksize) + 1);
  return V::scales(absmax + ((e >> log2_blocksize) - first_block), V::first_lanes(count),
                   V::scale_index(rest, log2_blocksize));
}

template <class P, int s, int kR, int kM, class L, class N, class F>
HALFBYTE_INLINE void multiply_parts(const L& levels, const N* nibbles, const typename P::Elem* x,
                                    F (*t)[kM]) {
  HALFBYTE_UNROLL
  for (int r = 0; r < kR; ++r) {
    const auto v = P::template level<s>(levels, nibbles[r]);
    HALFBYTE_UNROLL
    for (int i = 0; i < kM; ++i) t[r][i] = P::multiply(v, x + (i * P::kParts + s) * P::kLanes, t[r][i]);
  }
  if constexpr (s + 1 < P::kParts) multiply_parts<P, s + 1, kR, kM>(levels, nibbles, x, t);
}

// How a group finds its absmax: one for all of it, a fixed pattern, or blocks that begin anywhere.
enum class Scale { uniform, fixed, free };

// kR rows of the weight, from flat element `first`, against kM rows of x: sums[i * ld + r].  The rows of x
// alternate group by group, so that every load has a fixed offset.
template <class P, Scale kind, int kR, int kM>
HALFBYTE_ALONE void small_rows(const typename P::Elem* x, const Weight4& w, const float* absmax,
                               int64_t first_block, int64_t first, int64_t k, float* sums, int64_t ld) {
  using V = typename P::V;
  using F = typename V::F;
  constexpr int64_t group = 8 * V::W;
  const int log2_blocksize = log2_of(w.blocksize);
  const auto levels = P::levels_for(w.format);
  const auto index = V::scale_index(0, log2_blocksize);
  const auto mask = V::first_lanes(static_cast<int>(max64(1, group / w.blocksize)));
  F acc[kR][kM];
  HALFBYTE_UNROLL
  for (int r = 0; r < kR; ++r) {
    HALFBYTE_UNROLL
    for (int i = 0; i < kM; ++i) acc[r][i] = V::set1(0.0f);
  }
  const uint8_t* packed = w.packed + first / 2;
  const int64_t stride = k / 2, whole = k / group * group;
  const float* scales = absmax + ((first >> log2_blocksize) - first_block);
  const int64_t scale_stride = k >> log2_blocksize;
  for (int64_t p = 0; p < whole; p += group) {
    typename V::Nibbles nibbles[kR];
    F t[kR][kM];
    HALFBYTE_UNROLL
    for (int r = 0; r < kR; ++r) {
      const uint8_t* bytes = packed + r * stride + p / 2;
      nibbles[r] = V::nibbles(bytes);
      __builtin_prefetch(bytes + kR * stride);
      HALFBYTE_UNROLL
      for (int i = 0; i < kM; ++i) t[r][i] = V::set1(0.0f);
    }
    multiply_parts<P, 0, kR, kM>(levels, nibbles, x + p * kM, t);
    HALFBYTE_UNROLL
    for (int r = 0; r < kR; ++r) {
      F scale;
      if constexpr (kind == Scale::uniform) {
        scale = V::set1(read<float>(scales + r * scale_stride + (p >> log2_blocksize)));
      } else if constexpr (kind == Scale::fixed) {
        scale = V::scales(scales + r * scale_stride + (p >> log2_blocksize), mask, index);
      } else {
        scale = group_scales<V>(absmax, first_block, log2_blocksize, first + r * k + p, group);
      }
      HALFBYTE_UNROLL
      for (int i = 0; i < kM; ++i) acc[r][i] = V::fma(t[r][i], scale, acc[r][i]);
    }
  }
  if (whole < k) {
    typename V::Nibbles nibbles[kR];
    F t[kR][kM];
    for (int r = 0; r < kR; ++r) {
      uint8_t part[4 * V::W] = {};
      memcpy(part, packed + r * stride + whole / 2, static_cast<size_t>((k - whole) / 2));
      nibbles[r] = V::nibbles(part);
      for (int i = 0; i < kM; ++i) t[r][i] = V::set1(0.0f);
    }
    multiply_parts<P, 0, kR, kM>(levels, nibbles, x + whole * kM, t);
    for (int r = 0; r < kR; ++r) {
      const F scale = group_scales<V>(absmax, first_block, log2_blocksize, first + r * k + whole, k - whole);
      for (int i = 0; i < kM; ++i) acc[r][i] = V::fma(t[r][i], scale, acc[r][i]);
    }
  }
  const float post = P::post_scale(w.format);
  for (int r = 0; r < kR; ++r) {
    for (int i = 0; i < kM; ++i) sums[i * ld + r] = V::hsum(acc[r][i]) * post;
  }
}

template <class P, Scale kind, int kR>
HALFBYTE_INLINE void small_columns(const typename P::Elem* x, const Weight4& w, const float* absmax,
                                   int64_t first_block, int64_t first, int64_t m, int64_t k, float* sums,
                                   int64_t ld) {
  const int64_t depth = round_up(k, 8 * P::V::W);
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) {
    small_rows<P, kind, kR, 4>(x + i * depth, w, absmax, first_block, first, k, sums + i * ld, ld);
  }
  x += i * depth;
  sums += i * ld;
  switch (m - i) {
    case 1:
      return small_rows<P, kind, kR, 1>(x, w, absmax, first_block, first, k, sums, ld);
    case 2:
      return small_rows<P, kind, kR, 2>(x, w, absmax, first_block, first, k, sums, ld);
    case 3:
      return small_rows<P, kind, kR, 3>(x, w, absmax, first_block, first, k, sums, ld);
    default:
      return;
  }
}

// Four rows of the weight at a time for one row of x, which is bound by loads, else as registers allow.
template <class P, Scale kind>
void small_chunk(const typename P::Elem* x, const Weight4& w, const float* absmax, int64_t first_block,
                 int64_t row, int64_t rows, int64_t m, int64_t k, float* sums, int64_t ld) {
  int64_t r = 0;
  if (m == 1) {
    for (; r + 4 <= rows; r += 4) {
      small_rows<P, kind, 4, 1>(x, w, absmax, first_block, (row + r) * k, k, sums + r, ld);
    }
  }
  for (; r + P::kSmallRows <= rows; r += P::kSmallRows) {
    small_columns<P, kind, P::kSmallRows>(x, w, absmax, first_block, (row + r) * k, m, k, sums + r, ld);
  }
  for (; r < rows; ++r) {
    small_columns<P, kind, 1>(x, w, absmax, first_block, (row + r) * k, m, k, sums + r, ld);
  }
}

template <class P, class Finish>
const char* small_product(const typename P::Elem* panel, const Weight4& w, int64_t m, int64_t n, int64_t k,
                          int threads, const Finish& finish) {
  constexpr int64_t kRowsAtOnce = 32;
  const int log2_blocksize = log2_of(w.blocksize);
  int failed = 0;
  parallel_for(threads, ceil_div(n, kRowsAtOnce), [&](int64_t c) {
    const int64_t row = c * kRowsAtOnce, rows = min64(kRowsAtOnce, n - row);
    const auto [first, blocks] = blocks_of(row * k, rows * k, log2_blocksize);
    float* buffer = nullptr;
    if (w.absmax.nested != nullptr) {
      buffer = static_cast<float*>(scratch(slot_absmax, static_cast<size_t>(blocks) * sizeof(float)));
      if (buffer == nullptr) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
    }
    const float* absmax = absmax_range(w.absmax, first, blocks, buffer);
    float sums[P::kSmall * kRowsAtOnce];
    if (k % w.blocksize != 0) {
      small_chunk<P, Scale::free>(panel, w, absmax, first, row, rows, m, k, sums, kRowsAtOnce);
    } else if (w.blocksize >= 8 * P::V::W) {
      small_chunk<P, Scale::uniform>(panel, w, absmax, first, row, rows, m, k, sums, kRowsAtOnce);
    } else {
      small_chunk<P, Scale::fixed>(panel, w, absmax, first, row, rows, m, k, sums, kRowsAtOnce);
    }
    finish(row, rows, sums, kRowsAtOnce);
  });
  return failed != 0 ? no_memory : nullptr;
}

template <class V, class T>
HALFBYTE_INLINE void finish_row(const float* sums, const T* bias, int64_t count, T* y) {
  for (int64_t j = 0; j < count; j += V::W) {
    const int64_t size = min64(V::W, count - j);
    float part[V::W] = {};
    T add[V::W] = {}, out[V::W];
    memcpy(part, sums + j, static_cast<size_t>(size) * sizeof(float));
    typename V::F v = V::load(part);
    if (bias != nullptr) {
      memcpy(add, bias + j, static_cast<size_t>(size) * sizeof(T));
      v = V::add(v, V::load(add));
    }
    V::store(out, v);
    memcpy(y + j, out, static_cast<size_t>(size) * sizeof(T));
  }
}

template <class P, class T>
const char* linear4(const T* x, const Weight4& w, const T* bias, int64_t m, int64_t n, int64_t k, T* y,
                    int threads) {
  using V = typename P::V;
  using Elem = typename P::Elem;
  constexpr int64_t group = 8 * V::W;
  const int64_t depth = round_up(k, group), lda = padded<Elem>(depth);
  const int64_t at_once = panel_rows(m, lda * static_cast<int64_t>(sizeof(Elem)));
  Elem* panel = static_cast<Elem*>(scratch(slot_panel, static_cast<size_t>(at_once * lda) * sizeof(Elem)));
  if (panel == nullptr) return no_memory;
  for (int64_t m0 = 0; m0 < m; m0 += at_once) {
    const int64_t rows_of_x = min64(at_once, m - m0);
    const int workers = team(threads, n * k, int64_t{1} << 15);
    const bool small = rows_of_x <= P::kSmall && k % 8 == 0;
    parallel_for(team(threads, rows_of_x * k, int64_t{1} << 16), rows_of_x, [=](int64_t i) {
      const T* from = x + (m0 + i) * k;
      if (small) {  // see small_rows: fours of rows, alternating
        const int64_t block = i / 4 * 4, alternating = min64(4, rows_of_x - block);
        P::split_panel(from, k, panel + block * depth + (i - block) * group, alternating * group);
      } else {
        P::split_panel(from, k, panel + i * lda, group);
      }
    });
    const auto finish = [=](int64_t row, int64_t rows, const float* sums, int64_t ld) {
      for (int64_t i = 0; i < rows_of_x; ++i) {
        finish_row<V>(sums + i * ld, bias == nullptr ? nullptr : bias + row, rows, y + (m0 + i) * n + row);
      }
    };
    const char* error;
    if (small) {
      error = small_product<P>(panel, w, rows_of_x, n, k, workers, finish);
    } else {
      const auto decode = [=, &w](Elem* tile, int64_t ld, int64_t row, int64_t rows, int64_t k0,
                                  int64_t size) {
        const int log2_blocksize = log2_of(w.blocksize);
        float buffer[kChunkBytes / 32 + 2];
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t first = (row + r) * k + k0, count = min64(size, k - k0);
          const auto [block, blocks] = blocks_of(first, count, log2_blocksize);
          P::decode_row(w, absmax_range(w.absmax, block, blocks, buffer), log2_blocksize, first, count, 2 * k,
                        tile + r * ld, size);
        }
      };
      error = dot_tiles<typename P::Dot>(panel, lda, rows_of_x, n, depth, workers, decode, finish);
    }
    if (error != nullptr) return error;
  }
  return nullptr;
}

// fp32 arithmetic on any vector type.
template <class Vector>
struct Split32 {
  using V = Vector;
  using F = typename V::F;
  using Elem = float;
  using Dot = DotF32<V>;
  static constexpr int kLanes = V::W, kParts = 8;
  static constexpr int64_t kSmall = V::kSmall;
  static constexpr int kSmallRows = V::kSmallRows;
  static constexpr int64_t group = 8 * V::W;

  static HALFBYTE_INLINE typename V::Levels levels_for(Format format) { return V::levels(levels_of(format)); }
  static HALFBYTE_INLINE float post_scale(Format) { return 1.0f; }
  template <int s>
  static HALFBYTE_INLINE F level(const typename V::Levels& levels, const typename V::Nibbles& nibbles) {
    return V::template level<s>(levels, nibbles);
  }
  static HALFBYTE_INLINE F multiply(const F& v, const float* x, const F& t) {
    return V::fma(v, V::load(x), t);
  }

  template <class T>
  static HALFBYTE_INLINE void split_panel(const T* x, int64_t k, float* out, int64_t stride) {
    for (int64_t p = 0; p < k; p += group) {
      float natural[group];
      if (p + group <= k) {
        for (int64_t i = 0; i < group; i += V::W) V::store(natural + i, V::load(x + p + i));
      } else {
        T part[group] = {};
        memcpy(part, x + p, static_cast<size_t>(k - p) * sizeof(T));
        for (int64_t i = 0; i < group; i += V::W) V::store(natural + i, V::load(part + i));
      }
      V::split(natural, out + p / group * stride);
    }
  }

  template <int s>
  static HALFBYTE_INLINE void store_parts(const typename V::Levels& levels,
                                          const typename V::Nibbles& nibbles, const F& scale, float* out) {
    V::store(out + s * V::W, V::mul(V::template level<s>(levels, nibbles), scale));
    if constexpr (s < 7) store_parts<s + 1>(levels, nibbles, scale, out);
  }

  // `count` elements from flat element `first`, in split order and padded with zeros to `size`; what lies
  // `ahead` bytes is wanted soon.
  static HALFBYTE_ALONE void decode_row(const Weight4& w, const float* absmax, int log2_blocksize,
                                        int64_t first, int64_t count, int64_t ahead, float* out,
                                        int64_t size) {
    const int64_t first_block = first >> log2_blocksize;
    const typename V::Levels levels = levels_for(w.format);
    int64_t p = 0;
    if (first % 8 == 0) {
      for (; p + group <= count; p += group) {
        __builtin_prefetch(w.packed + (first + p) / 2 + ahead);
        const F scale = group_scales<V>(absmax, first_block, log2_blocksize, first + p, group);
        store_parts<0>(levels, V::nibbles(w.packed + (first + p) / 2), scale, out + p);
      }
    }
    for (; p < size; p += group) {
      float natural[group] = {};
      if (p < count) {
        decode_flat<V, false>(w.packed, absmax + (((first + p) >> log2_blocksize) - first_block),
                              levels_of(w.format), log2_blocksize, first + p, min64(group, count - p),
                              natural);
      }
      V::split(natural, out + p);
    }
  }
};

template <class V>
const char* linear_4bit(const void* x, DType dtype, Weight4 weight, const void* bias, int64_t m, int64_t n,
                        int64_t k, void* y, int threads) {
  return with_dtype(dtype, [=](auto* type) -> const char* {
    using Pointer = decltype(type);
    return linear4<Split32<V>>(static_cast<Pointer>(const_cast<void*>(x)), weight,
                               static_cast<Pointer>(const_cast<void*>(bias)), m, n, k,
                               static_cast<Pointer>(y), threads);
  });
}

}  // namespace
}  // namespace halfbyte::cpu
