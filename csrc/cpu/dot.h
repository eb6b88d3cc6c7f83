// dot.h: y[m][n] = sum over k of a[m][k] * b[n][k], the one matrix product of all linear ops.
//
// Layout    both operands run along k, so a weight row is used as it lies: no transposition.  A vector holds
//           D::kStep values of k, an accumulator its partial sums, added up across lanes once per chunk.
// Work      threads take tiles of n.  A tile of the weight is decoded chunk by chunk (kChunkBytes per row)
//           into memory that stays in L2, and blocks of D::kRows rows of `a`, which stay in L1, run over it
//           with D::kRows * 4 accumulators.
// D         names the arithmetic: A, B (element types), Sum (float or int32_t), Acc, load_a, load_b, step,
//           and add4, which adds four accumulators' lane sums to four numbers.
#pragma once
#include "prelude.h"

namespace halfbyte::cpu {
namespace {

inline constexpr int64_t kChunkBytes = 3072;  // six rows of `a` and four of b fit into L1 together
inline constexpr int64_t kTileRows = 64;
inline constexpr int64_t kPanelBytes = int64_t{4} << 20;  // of `a` that is prepared at a time

// A row length of which consecutive rows do not fall into the same sets of the L1 cache, which powers of two
// do.
template <class Elem>
HALFBYTE_INLINE int64_t padded(int64_t length) {
  return length + 64 / static_cast<int64_t>(sizeof(Elem));
}

template <class D, int kM>
HALFBYTE_ALONE void dot_block(const typename D::A* a, int64_t lda, const typename D::B* const* b, int64_t k,
                              typename D::Sum* sums, int64_t ld) {
  typename D::Acc acc[kM][4];
  HALFBYTE_UNROLL
  for (int i = 0; i < kM; ++i) {
    HALFBYTE_UNROLL
    for (int j = 0; j < 4; ++j) acc[i][j] = D::zero();
  }
  const typename D::B *b0 = b[0], *b1 = b[1], *b2 = b[2], *b3 = b[3];
  for (int64_t p = 0; p < k; p += D::kStep) {
    const typename D::BV v[4] = {D::load_b(b0 + p), D::load_b(b1 + p), D::load_b(b2 + p), D::load_b(b3 + p)};
    HALFBYTE_UNROLL
    for (int i = 0; i < kM; ++i) {
      const typename D::AV u = D::load_a(a + i * lda + p);
      HALFBYTE_UNROLL
      for (int j = 0; j < 4; ++j) acc[i][j] = D::step(acc[i][j], u, v[j]);
    }
  }
  HALFBYTE_UNROLL
  for (int i = 0; i < kM; ++i) D::add4(sums + i * ld, acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
}

// All m rows of `a` against four rows of b; k is a multiple of D::kStep.
template <class D>
HALFBYTE_INLINE void dot_rows(const typename D::A* a, int64_t lda, int64_t m, const typename D::B* const* b,
                              int64_t k, typename D::Sum* sums, int64_t ld) {
  switch (m) {
    case 1:
      return dot_block<D, 1>(a, lda, b, k, sums, ld);
    case 2:
      return dot_block<D, 2>(a, lda, b, k, sums, ld);
    case 3:
      if constexpr (D::kRows >= 3) return dot_block<D, 3>(a, lda, b, k, sums, ld);
      break;
    case 4:
      if constexpr (D::kRows >= 4) return dot_block<D, 4>(a, lda, b, k, sums, ld);
      break;
    case 5:
      if constexpr (D::kRows >= 5) return dot_block<D, 5>(a, lda, b, k, sums, ld);
      break;
    case 6:
      if constexpr (D::kRows >= 6) return dot_block<D, 6>(a, lda, b, k, sums, ld);
      break;
    default:
      break;
  }
}

// panel     m rows of `a`, lda apart, k padded with zeros to a multiple of D::kStep
// decode    (tile, ld, row, rows, k0, size) writes rows of the weight, k0 .. k0 + size - 1
// finish    (row, rows, sums, ld) takes the sums of these weight rows: sums[i * ld + j] for row i of `a`
template <class D, class Decode, class Finish>
const char* dot_tiles(const typename D::A* panel, int64_t lda, int64_t m, int64_t n, int64_t k, int threads,
                      const Decode& decode, const Finish& finish) {
  using B = typename D::B;
  using Sum = typename D::Sum;
  constexpr int64_t chunk = kChunkBytes / static_cast<int64_t>(sizeof(B));
  const int64_t tile_rows = tile_rows_of(n, threads, kTileRows);
  const int64_t tiles = ceil_div(n, tile_rows), ld = tile_rows;
  // For few rows of `a` each decoded row is read a few times only: keep it in L1.
  const int64_t decoded = m <= 10 * D::kRows ? 4 : tile_rows;
  int failed = 0;
  parallel_for(threads, tiles, [&](int64_t t) {
    B* tile = static_cast<B*>(
        scratch(slot_tile, static_cast<size_t>(decoded * padded<B>(min64(chunk, k))) * sizeof(B)));
    Sum* sums = static_cast<Sum*>(scratch(slot_sums, static_cast<size_t>(m * ld) * sizeof(Sum)));
    if (tile == nullptr || sums == nullptr) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    const int64_t row = t * tile_rows, rows = min64(tile_rows, n - row);
    memset(sums, 0, static_cast<size_t>(m * ld) * sizeof(Sum));
    for (int64_t k0 = 0; k0 < k; k0 += chunk) {
      const int64_t size = min64(chunk, k - k0), ldt = padded<B>(size);
      for (int64_t first = 0; first < rows; first += decoded) {
        const int64_t count = min64(decoded, rows - first);
        decode(tile, ldt, row + first, count, k0, size);
        for (int64_t i = 0; i < m; i += D::kRows) {
          for (int64_t j = 0; j < count; j += 4) {
            const B* b[4];
            for (int64_t q = 0; q < 4; ++q) b[q] = tile + min64(j + q, count - 1) * ldt;
            dot_rows<D>(panel + i * lda + k0, lda, min64(D::kRows, m - i), b, size, sums + i * ld + first + j,
                        ld);
          }
        }
      }
    }
    finish(row, rows, sums, ld);
  });
  return failed != 0 ? no_memory : nullptr;
}

// Rows of `a` whose prepared panel, `bytes` each, is a sensible piece of work.
HALFBYTE_INLINE int64_t panel_rows(int64_t m, int64_t bytes) {
  return min64(m, max64(24, kPanelBytes / max64(1, bytes) / 24 * 24));
}

template <class V>
struct DotF32 {
  using A = float;
  using B = float;
  using Sum = float;
  using Acc = typename V::F;
  using AV = typename V::F;
  using BV = typename V::F;
  static constexpr int kStep = V::W;
  static constexpr int kRows = V::kRows;
  static HALFBYTE_INLINE Acc zero() { return V::set1(0.0f); }
  static HALFBYTE_INLINE AV load_a(const float* p) { return V::load(p); }
  static HALFBYTE_INLINE BV load_b(const float* p) { return V::load(p); }
  static HALFBYTE_INLINE Acc step(Acc c, AV a, BV b) { return V::fma(a, b, c); }
  static HALFBYTE_INLINE void add4(float* to, Acc a, Acc b, Acc c, Acc d) { V::add4(to, a, b, c, d); }
};

}  // namespace
}  // namespace halfbyte::cpu
