// linear.cpp: the matrix products, over few and many rows, odd N and K, and rows that begin anywhere in a
// byte, a vector or a block.
#include <cmath>
#include <cstring>

#include "check.h"

namespace halfbyte::check {
namespace {

struct Shape {
  int64_t m, n, k;
};

std::string label(const char* op, DType dtype, Shape s) {
  static const char* const names[] = {"float32", "float16", "bfloat16"};
  return std::string(op) + " " + names[static_cast<int>(dtype)] + " M=" + std::to_string(s.m) +
         " N=" + std::to_string(s.n) + " K=" + std::to_string(s.k);
}

// Sums of other order: the error follows the root of the sum of squared products, `squares`, and the last
// rounding the result.  bfloat16 has levels that round the weight to 8 bits.
std::string far_off(DType dtype, const std::vector<double>& squares, const std::vector<Bytes>& want,
                    const std::vector<Bytes>& got) {
  const double last = dtype == DType::float32 ? 1e-6 : dtype == DType::float16 ? 1.0e-3 : 8.0e-3;
  const double sum = dtype == DType::bfloat16 ? 8.0e-3 : 1.0e-5;
  for (size_t i = 0; i < squares.size(); ++i) {
    const float a = get(want[0].data(), dtype, static_cast<int64_t>(i));
    const float b = get(got[0].data(), dtype, static_cast<int64_t>(i));
    if (!std::isfinite(a) && !std::isfinite(b)) continue;
    const double spread = std::isfinite(squares[i]) ? std::sqrt(squares[i]) : std::fabs(a);
    if (std::fabs(static_cast<double>(a) - b) <= last * std::fabs(a) + sum * spread + 1e-7) continue;
    return "value " + std::to_string(i) + " is " + std::to_string(b) + ", the scalar level gives " +
           std::to_string(a);
  }
  return {};
}

// squares[i][j] = sum over p of (a[i][p] * b[j][p])^2, where b may be transposed.
std::vector<double> squares_of(const std::vector<float>& a, const std::vector<float>& b, Shape s,
                               bool transposed) {
  std::vector<double> out;
  for (int64_t i = 0; i < s.m; ++i) {
    for (int64_t j = 0; j < s.n; ++j) {
      double sum = 0;
      for (int64_t p = 0; p < s.k; ++p) {
        const double v = static_cast<double>(a[static_cast<size_t>(i * s.k + p)]) *
                         static_cast<double>(b[static_cast<size_t>(transposed ? p * s.n + j : j * s.k + p)]);
        sum += v * v;
      }
      out.push_back(sum);
    }
  }
  return out;
}

std::vector<float> widened(const Bytes& x, DType dtype) {
  std::vector<float> out;
  for (int64_t i = 0; i < static_cast<int64_t>(x.size()) / size_of(dtype); ++i) {
    out.push_back(get(x.data(), dtype, i));
  }
  return out;
}

cpu::Weight4 weight_at(const Pointers& in, const Packed& w) {
  const bool nested = !w.nested.empty();
  return {static_cast<uint8_t*>(in[1]),
          {in[2], nested ? static_cast<float*>(in[3]) : nullptr, static_cast<float*>(in[4]),
           static_cast<float*>(in[5])},
          w.format,
          w.blocksize};
}

bool bfloat_only(const Level& level) { return std::strcmp(level.name, "avx512bf16") == 0; }

void fourbit(Random& random, DType dtype, Shape s, int special) {
  const int64_t blocksize = int64_t{32} << (random.below(2) != 0 ? random.below(8) : random.below(3));
  const Format format = random.below(2) != 0 ? Format::nf4 : Format::fp4;
  const bool with_bias = random.below(2) != 0;
  const Packed w = packed_weight(random, s.n * s.k, format, blocksize, random.below(2) != 0);
  Bytes flat(static_cast<size_t>(s.n * s.k * 4));
  Pointers parts{nullptr,
                 const_cast<unsigned char*>(w.packed.data()),
                 const_cast<unsigned char*>(w.absmax.data()),
                 const_cast<unsigned char*>(w.nested.data()),
                 const_cast<unsigned char*>(w.codebook.data()),
                 const_cast<unsigned char*>(w.offset.data())};
  machine_levels().front()->dequantize_4bit(weight_at(parts, w), flat.data(), DType::float32, s.n * s.k, 1);
  const std::vector<float> values = widened(flat, DType::float32);
  const std::string tail = (format == Format::nf4 ? " nf4 " : " fp4 ") + std::to_string(blocksize) +
                           (w.nested.empty() ? "" : " nested") + (with_bias ? " bias" : "");
  const auto takes = [=](const Level& level) {
    return level.linear_4bit != nullptr && (dtype == DType::bfloat16 || !bfloat_only(level));
  };

  const Bytes x = floats(random, s.m * s.k, dtype, special);
  const std::vector<double> forward = squares_of(widened(x, dtype), values, s, false);
  run(random,
      {label("linear_4bit", dtype, s) + tail,
       {x, w.packed, w.absmax, w.nested, w.codebook, w.offset, floats(random, s.n, dtype, 0)},
       {s.m * s.n * size_of(dtype)},
       takes,
       [=](const Level& level, const Pointers& in, const Pointers& out, int threads) {
         return level.linear_4bit(in[0], dtype, weight_at(in, w), with_bias ? in[6] : nullptr, s.m, s.n, s.k,
                                  out[0], threads);
       },
       [=](const std::vector<Bytes>& want, const std::vector<Bytes>& got) {
         return far_off(dtype, forward, want, got);
       }},
      false);

  const Bytes dy = floats(random, s.m * s.n, dtype, special);
  const std::vector<double> backward = squares_of(widened(dy, dtype), values, {s.m, s.k, s.n}, true);
  run(random,
      {label("linear_4bit_backward", dtype, s) + tail,
       {dy, w.packed, w.absmax, w.nested, w.codebook, w.offset},
       {s.m * s.k * size_of(dtype)},
       takes,
       [=](const Level& level, const Pointers& in, const Pointers& out, int threads) {
         return level.linear_4bit_backward(in[0], dtype, weight_at(in, w), s.m, s.n, s.k, out[0], threads);
       },
       [=](const std::vector<Bytes>& want, const std::vector<Bytes>& got) {
         return far_off(dtype, backward, want, got);
       }},
      false);
}

void product(Random& random, Shape s, bool extreme) {
  Bytes a = bytes(random, s.m * s.k), b = bytes(random, s.n * s.k);
  if (extreme) {  // sums that leave 32 bits from K = 131,072 on
    a.assign(a.size(), 0x80);
    b.assign(b.size(), 0x80);
  }
  const std::vector<Bytes> sums =
      run(random,
          {label("matmul_int8", DType::float32, s),
           {a, b},
           {s.m * s.n * 4},
           [](const Level& level) { return level.matmul_int8 != nullptr; },
           [=](const Level& level, const Pointers& in, const Pointers& out, int threads) {
             return level.matmul_int8(static_cast<int8_t*>(in[0]), static_cast<int8_t*>(in[1]), s.m, s.n, s.k,
                                      static_cast<int32_t*>(out[0]), threads);
           },
           {}},
          s.m * s.n * s.k < 2000);
  if (s.m * s.n == 0) return;
  int64_t exact = 0;
  for (int64_t p = 0; p < s.k; ++p) {
    exact += static_cast<int64_t>(static_cast<int8_t>(a[static_cast<size_t>(p)])) *
             static_cast<int8_t>(b[static_cast<size_t>(p)]);
  }
  int32_t first;
  std::memcpy(&first, sums[0].data(), 4);
  if (static_cast<uint32_t>(first) != static_cast<uint32_t>(exact)) {
    fail(label("matmul_int8", DType::float32, s) + ": the first sum is " + std::to_string(first) + ", not " +
         std::to_string(exact) + " modulo 2^32");
  }
}

void int8_layer(Random& random, DType dtype, Shape s, int special) {
  const bool exact = random.below(2) != 0, with_bias = random.below(2) != 0;
  const float threshold = exact && random.below(2) != 0 ? 2.0f : 0.0f;
  const Bytes x = floats(random, s.m * s.k, dtype, special), q = bytes(random, s.n * s.k);
  const Bytes absmax = floats(random, s.n, DType::float32, 0);
  std::vector<float> values;
  for (int64_t i = 0; i < s.n * s.k; ++i) {
    values.push_back(static_cast<float>(static_cast<int8_t>(q[static_cast<size_t>(i)])) *
                     get(absmax.data(), DType::float32, i / s.k) / 127.0f);
  }
  const std::vector<double> squares = squares_of(widened(x, dtype), values, s, false);
  run(random,
      {label("linear_int8", dtype, s) + (exact ? " exact, threshold " : " w8a16, threshold ") +
           std::to_string(threshold) + (with_bias ? " bias" : ""),
       {x, q, absmax, floats(random, s.n, dtype, 0)},
       {s.m * s.n * size_of(dtype)},
       [](const Level& level) { return level.linear_int8 != nullptr; },
       [=](const Level& level, const Pointers& in, const Pointers& out, int threads) {
         return level.linear_int8(in[0], dtype, static_cast<int8_t*>(in[1]), static_cast<float*>(in[2]),
                                  with_bias ? in[3] : nullptr, threshold, exact, s.m, s.n, s.k, out[0],
                                  threads);
       },
       [=](const std::vector<Bytes>& want, const std::vector<Bytes>& got) {
         return far_off(dtype, squares, want, got);
       }},
      false);
}

}  // namespace

void check_linear() {
  Random random(20241);
  for (const int64_t m : {0, 1, 2, 3, 4, 5, 7, 16, 33}) {
    for (const int64_t n : {0, 1, 2, 3, 5, 33}) {
      for (const int64_t k : {0, 1, 2, 7, 8, 9, 31, 32, 33, 40, 64, 72, 127, 128, 129, 200, 264}) {
        for (const DType dtype : kDTypes) {
          fourbit(random, dtype, {m, n, k}, 0);
          int8_layer(random, dtype, {m, n, k}, 0);
        }
        product(random, {m, n, k}, false);
      }
    }
  }
  for (const DType dtype : kDTypes) {
    for (const Shape s :
         {Shape{1, 130, 4100}, {4, 70, 2120}, {5, 130, 1048}, {33, 70, 1033}, {260, 67, 136}}) {
      fourbit(random, dtype, s, 0);
      int8_layer(random, dtype, s, 0);
    }
    for (const Shape s : {Shape{3, 33, 200}, {7, 5, 129}}) {
      fourbit(random, dtype, s, 1);
      int8_layer(random, dtype, s, 1);
    }
  }
  for (const Shape s : {Shape{1, 67, 4161}, {7, 33, 4161}, {133, 66, 1000}}) product(random, s, false);
  product(random, {2, 5, 140001}, true);
}

}  // namespace halfbyte::check
