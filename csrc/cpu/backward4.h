// backward4.h: dx[m][k] = sum over n of dy[m][n] * W[n][k] over a packed 4-bit weight.
//
// Work      threads take slabs of columns.  kDepth weight rows of a slab are decoded in natural order into
//           L2, then kRows rows of dy are multiplied in: each weight vector is loaded once for all of them,
//           dy is broadcast. The whole weight is never written out.
// Bound by  the multipliers; decoding for few rows of dy.
#pragma once
#include "fourbit.h"

namespace halfbyte::cpu {
namespace {

// kM rows of dy, kDepth deep, against four vectors of columns: sums += dy * tile.
template <class V, int kM>
HALFBYTE_ALONE void outer_block(const float* dy, int64_t ldy, int64_t depth, const float* tile, int64_t ldt,
                                float* sums, int64_t lds) {
  constexpr int kC = V::kColumns;
  typename V::F acc[kM][kC];
  HALFBYTE_UNROLL
  for (int i = 0; i < kM; ++i) {
    HALFBYTE_UNROLL
    for (int j = 0; j < kC; ++j) acc[i][j] = V::set1(0.0f);
  }
  for (int64_t p = 0; p < depth; ++p) {
    typename V::F b[kC];
    HALFBYTE_UNROLL
    for (int j = 0; j < kC; ++j) b[j] = V::load(tile + p * ldt + j * V::W);
    HALFBYTE_UNROLL
    for (int i = 0; i < kM; ++i) {
      const typename V::F a = V::set1(dy[i * ldy + p]);
      HALFBYTE_UNROLL
      for (int j = 0; j < kC; ++j) acc[i][j] = V::fma(a, b[j], acc[i][j]);
    }
  }
  HALFBYTE_UNROLL
  for (int i = 0; i < kM; ++i) {
    HALFBYTE_UNROLL
    for (int j = 0; j < kC; ++j) {
      float* to = sums + i * lds + j * V::W;  // in one go, so that roundings do not pile up over all of n
      V::store(to, V::add(V::load(to), acc[i][j]));
    }
  }
}

template <class Vector>
struct Outer32 {
  using V = Vector;
  using Elem = float;  // of dy's panel and of the tile
  static constexpr int64_t kDepth = 128, kSlab = 256, kPack = 1;
  static constexpr int64_t kColumns = V::kColumns * V::W;

  template <class T>
  static HALFBYTE_INLINE void panel_row(const T* dy, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + V::W <= n; i += V::W) V::store(out + i, V::load(dy + i));
    if (i < n) {
      T part[V::W] = {};
      float values[V::W];
      memcpy(part, dy + i, static_cast<size_t>(n - i) * sizeof(T));
      V::store(values, V::load(part));
      memcpy(out + i, values, static_cast<size_t>(n - i) * sizeof(float));
    }
  }
  static HALFBYTE_INLINE void decode(const Weight4& w, int log2_blocksize, int64_t k, int64_t row,
                                     int64_t rows, int64_t column, int64_t columns, int64_t width,
                                     float* tile) {
    float buffer[kSlab / 32 + 2];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t first = (row + r) * k + column;
      const auto [block, blocks] = blocks_of(first, columns, log2_blocksize);
      decode_flat<V, false>(w.packed, absmax_range(w.absmax, block, blocks, buffer), levels_of(w.format),
                            log2_blocksize, first, columns, tile + r * width);
      memset(tile + r * width + columns, 0, static_cast<size_t>(width - columns) * sizeof(float));
    }
  }
  template <int kM>
  static HALFBYTE_INLINE void block(const float* dy, int64_t ldy, int64_t depth, const float* tile,
                                    int64_t ldt, float* sums, int64_t lds) {
    outer_block<V, kM>(dy, ldy, depth, tile, ldt, sums, lds);
  }
};

template <class P>
HALFBYTE_INLINE void outer_rows(const typename P::Elem* dy, int64_t ldy, int64_t m, int64_t depth,
                                const typename P::Elem* tile, int64_t ldt, float* sums, int64_t lds) {
  constexpr int kRows = P::V::kRows;
  int64_t i = 0;
  for (; i + kRows <= m; i += kRows)
    P::template block<kRows>(dy + i * ldy, ldy, depth, tile, ldt, sums + i * lds, lds);
  for (; i < m; ++i) P::template block<1>(dy + i * ldy, ldy, depth, tile, ldt, sums + i * lds, lds);
}

template <class P, class T>
const char* backward4(const T* dy, const Weight4& w, int64_t m, int64_t n, int64_t k, T* dx, int threads) {
  using V = typename P::V;
  using Elem = typename P::Elem;
  constexpr int64_t kMostRows = 240;  // of dy at a time, a multiple of every kRows
  const int log2_blocksize = log2_of(w.blocksize);
  const int64_t ldy = round_up(n, P::kPack), at_once = min64(m, kMostRows);
  Elem* panel = static_cast<Elem*>(scratch(slot_panel, static_cast<size_t>(at_once * ldy) * sizeof(Elem)));
  if (panel == nullptr) return no_memory;
  const int64_t slab = min64(P::kSlab, max64(P::kColumns, round_up(ceil_div(k, threads), P::kColumns)));
  int failed = 0;
  for (int64_t m0 = 0; m0 < m; m0 += at_once) {
    const int64_t rows_of_dy = min64(at_once, m - m0);
    parallel_for(team(threads, rows_of_dy * n, int64_t{1} << 16), rows_of_dy,
                 [=](int64_t i) { P::panel_row(dy + (m0 + i) * n, n, panel + i * ldy); });
    parallel_for(team(threads, n * k, int64_t{1} << 15), ceil_div(k, slab), [&, m0, rows_of_dy](int64_t c) {
      const int64_t column = c * slab, columns = min64(slab, k - column),
                    width = round_up(columns, P::kColumns);
      Elem* tile =
          static_cast<Elem*>(scratch(slot_tile, static_cast<size_t>(P::kDepth * width) * sizeof(Elem)));
      float* sums =
          static_cast<float*>(scratch(slot_sums, static_cast<size_t>(rows_of_dy * width) * sizeof(float)));
      if (tile == nullptr || sums == nullptr) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
      memset(sums, 0, static_cast<size_t>(rows_of_dy * width) * sizeof(float));
      for (int64_t row = 0; row < n; row += P::kDepth) {
        const int64_t rows = min64(P::kDepth, n - row);
        P::decode(w, log2_blocksize, k, row, rows, column, columns, width, tile);
        for (int64_t j = 0; j < width; j += P::kColumns) {
          outer_rows<P>(panel + row, ldy, rows_of_dy, rows, tile + j * P::kPack, width, sums + j, width);
        }
      }
      for (int64_t i = 0; i < rows_of_dy; ++i) {
        const float* from = sums + i * width;
        T* to = dx + (m0 + i) * k + column;
        int64_t j = 0;
        for (; j + V::W <= columns; j += V::W) V::store(to + j, V::load(from + j));
        if (j < columns) {
          T values[V::W];
          V::store(values, V::load(from + j));
          memcpy(to + j, values, static_cast<size_t>(columns - j) * sizeof(T));
        }
      }
    });
    if (failed != 0) return no_memory;
  }
  return nullptr;
}

template <class V>
const char* linear_4bit_backward(const void* dy, DType dtype, Weight4 weight, int64_t m, int64_t n, int64_t k,
                                 void* dx, int threads) {
  return with_dtype(dtype, [=](auto* type) -> const char* {
    using Pointer = decltype(type);
    return backward4<Outer32<V>>(static_cast<Pointer>(const_cast<void*>(dy)), weight, m, n, k,
                                 static_cast<Pointer>(dx), threads);
  });
}

}  // namespace
}  // namespace halfbyte::cpu
