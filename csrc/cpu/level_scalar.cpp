// level_scalar.cpp: every op in plain C++, for any machine.
#include "levels.h"
#include "vec_plain.h"
#include "backward4.h"
#include "eightbit.h"
#include "int8.h"
#include "optimizer.h"

namespace halfbyte::cpu {
namespace {

struct DotTile {
  using A = int16_t;
  using B = int16_t;
  using Sum = int32_t;
  using Acc = uint32_t;  // sums wrap, as those of every level
  struct AV {
    const int16_t* p;
  };
  using BV = AV;
  static constexpr int kStep = 16;
  static constexpr int kRows = 2;
  static Acc zero() { return 0; }
  static AV load_a(const int16_t* p) { return {p}; }
  static BV load_b(const int16_t* p) { return {p}; }
  static Acc step(Acc c, AV a, BV b) {
    int32_t sum = 0;
    for (int i = 0; i < kStep; ++i) sum += a.p[i] * b.p[i];
    return c + static_cast<uint32_t>(sum);
  }
  static void add4(int32_t* to, Acc a, Acc b, Acc c, Acc d) {
    const Acc sums[4] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) to[i] = static_cast<int32_t>(static_cast<uint32_t>(to[i]) + sums[i]);
  }
  static int32_t prepare(const int8_t* q, int64_t k, int64_t padded, int16_t* out) {
    for (int64_t i = 0; i < padded; ++i) out[i] = i < k ? q[i] : int8_t{0};
    return 0;
  }
  // A weight row for a tile, widened and padded.
  static void copy_row(const int8_t* q, int64_t count, int64_t, int16_t* out, int64_t size) {
    for (int64_t i = 0; i < size; ++i) out[i] = i < count ? q[i] : int16_t{0};
  }
};

// Straight from the weight.
struct DotInt8 : DotTile {
  using B = int8_t;
  using Tile = DotTile;
  struct BV {
    const int8_t* p;
  };
  static BV load_b(const int8_t* p) { return {p}; }
  static Acc step(Acc c, AV a, BV b) {
    for (int i = 0; i < kStep; ++i) c += a.p[i] * b.p[i];
    return c;
  }
};

}  // namespace

const Level level_scalar = {
    "scalar",
    quantize_4bit<Plain>,
    dequantize_4bit<Plain>,
    linear_4bit<Plain>,
    linear_4bit_backward<Plain>,
    quantize_8bit<Plain>,
    dequantize_8bit<Plain>,
    quantize_int8_rows<Plain>,
    dequantize_int8<Plain>,
    matmul_int8<DotInt8>,
    linear_int8<Plain, DotInt8>,
    update_32bit<Plain>,
    update_8bit<Plain>,
};

}  // namespace halfbyte::cpu
