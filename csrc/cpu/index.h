// index.h: the arithmetic of sizes and positions, all of it in 64 bits.
//
// Constant expressions, so that check/index.cpp tests it past 2^32 without any memory, and so that an
// overflow there does not compile.
#pragma once
#include <stdint.h>

#define HALFBYTE_INLINE inline __attribute__((always_inline))

namespace halfbyte::cpu {
namespace {

HALFBYTE_INLINE constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
HALFBYTE_INLINE constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
HALFBYTE_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
HALFBYTE_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

HALFBYTE_INLINE constexpr int log2_of(int64_t power_of_two) {
  return __builtin_ctzll(static_cast<uint64_t>(power_of_two));
}

// Threads for `work` units when one thread should have at least `grain` of them.
HALFBYTE_INLINE constexpr int team(int threads, int64_t work, int64_t grain) {
  const int64_t useful = work / grain;
  return static_cast<int>(max64(1, min64(threads, useful)));
}

struct Span {
  int64_t first, size;
};

// The blocks that elements first .. first + size - 1 of a flat tensor lie in.
HALFBYTE_INLINE constexpr Span blocks_of(int64_t first, int64_t size, int log2_blocksize) {
  const int64_t block = first >> log2_blocksize;
  return {block, ((first + size - 1) >> log2_blocksize) + 1 - block};
}

// Rows of a product's tile, a multiple of 4: at most `most`, fewer where threads would be left without one.
HALFBYTE_INLINE constexpr int64_t tile_rows_of(int64_t n, int threads, int64_t most) {
  return min64(most, round_up(max64(1, ceil_div(n, threads)), 4));
}

}  // namespace
}  // namespace halfbyte::cpu
