// elementwise.cpp: ops whose levels agree bit for bit, over sizes around every vector length and chunk.
#include "check.h"

namespace halfbyte::check {
namespace {

constexpr int64_t kSizes[] = {0,  1,  2,  3,  7,  8,   9,   15,  16,   17,   31,    32,    33,
                              47, 63, 64, 65, 95, 127, 128, 129, 1000, 4097, 65537, 140001};

std::string label(const char* op, DType dtype, int64_t count) {
  static const char* const names[] = {"float32", "float16", "bfloat16"};
  return std::string(op) + " " + names[static_cast<int>(dtype)] + " " + std::to_string(count);
}

void fourbit(Random& random, DType dtype, int64_t count, Format format, int64_t blocksize, int special) {
  const int64_t blocks = (count + blocksize - 1) / blocksize;
  const std::string tail = format == Format::nf4 ? " nf4 " : " fp4 ";
  run(random,
      {label("quantize_4bit", dtype, count) + tail + std::to_string(blocksize),
       {floats(random, count, dtype, special)},
       {(count + 1) / 2, blocks * 4},
       [](const Level& level) { return level.quantize_4bit != nullptr; },
       [=](const Level& level, const Pointers& in, const Pointers& out, int threads) {
         return level.quantize_4bit(in[0], dtype, count, format, blocksize, static_cast<uint8_t*>(out[0]),
                                    static_cast<float*>(out[1]), threads);
       },
       {}},
      count < 5000);
  for (const bool nested : {false, true}) {
    const Packed w = packed_weight(random, count, format, blocksize, nested);
    run(random,
        {label("dequantize_4bit", dtype, count) + tail + std::to_string(blocksize) +
             (nested ? " nested" : ""),
         {w.packed, w.absmax, w.nested, w.codebook, w.offset},
         {count * size_of(dtype)},
         [](const Level& level) { return level.dequantize_4bit != nullptr; },
         [=](const Level& level, const Pointers& in, const Pointers& out, int threads) {
           const cpu::Absmax absmax{in[1], nested ? static_cast<float*>(in[2]) : nullptr,
                                    static_cast<float*>(in[3]), static_cast<float*>(in[4])};
           return level.dequantize_4bit({static_cast<uint8_t*>(in[0]), absmax, format, blocksize}, out[0],
                                        dtype, count, threads);
         },
         {}},
        count < 5000);
  }
}

void eightbit(Random& random, DType dtype, int64_t count, int64_t blocksize, bool crowded, int special) {
  const int64_t blocks = (count + blocksize - 1) / blocksize;
  const std::string tail = " blocks of " + std::to_string(blocksize) + (crowded ? " crowded" : "");
  run(random,
      {label("quantize_8bit", dtype, count) + tail,
       {floats(random, count, dtype, special), codebook(random, crowded)},
       {count, blocks * 4},
       [](const Level& level) { return level.quantize_8bit != nullptr; },
       [=](const Level& level, const Pointers& in, const Pointers& out, int threads) {
         return level.quantize_8bit(in[0], dtype, count, static_cast<float*>(in[1]), blocksize,
                                    static_cast<uint8_t*>(out[0]), static_cast<float*>(out[1]), threads);
       },
       {}},
      count < 5000);
  run(random,
      {label("dequantize_8bit", dtype, count) + tail,
       {bytes(random, count), floats(random, blocks, DType::float32, 0), codebook(random, crowded)},
       {count * size_of(dtype)},
       [](const Level& level) { return level.dequantize_8bit != nullptr; },
       [=](const Level& level, const Pointers& in, const Pointers& out, int threads) {
         return level.dequantize_8bit(static_cast<uint8_t*>(in[0]), static_cast<float*>(in[1]),
                                      static_cast<float*>(in[2]), blocksize, out[0], dtype, count, threads);
       },
       {}},
      count < 5000);
}

void int8_rows(Random& random, DType dtype, int64_t rows, int64_t k, float threshold, int special) {
  const std::string shape = " rows of " + std::to_string(k);
  run(random,
      {label("quantize_int8_rows", dtype, rows) + shape + " threshold " + std::to_string(threshold),
       {floats(random, rows * k, dtype, special)},
       {rows * k, rows * 4, k},
       [](const Level& level) { return level.quantize_int8_rows != nullptr; },
       [=](const Level& level, const Pointers& in, const Pointers& out, int threads) {
         return level.quantize_int8_rows(in[0], dtype, rows, k, threshold, static_cast<int8_t*>(out[0]),
                                         static_cast<float*>(out[1]), static_cast<uint8_t*>(out[2]), threads);
       },
       {}},
      rows * k < 5000);
  for (int variant = 0; variant < 8; ++variant) {
    const bool wide = (variant & 1) != 0, columns = (variant & 2) != 0, bias = (variant & 4) != 0;
    run(random,
        {label("dequantize_int8", dtype, rows) + shape + " variant " + std::to_string(variant),
         {bytes(random, rows * k * (wide ? 4 : 1)), floats(random, rows, DType::float32, special),
          floats(random, k, DType::float32, special), floats(random, k, DType::float32, special)},
         {rows * k * size_of(dtype)},
         [](const Level& level) { return level.dequantize_int8 != nullptr; },
         [=](const Level& level, const Pointers& in, const Pointers& out, int threads) {
           return level.dequantize_int8(
               in[0], wide, static_cast<float*>(in[1]), columns ? static_cast<float*>(in[2]) : nullptr,
               bias ? static_cast<float*>(in[3]) : nullptr, out[0], dtype, rows, k, threads);
         },
         [=](const std::vector<Bytes>& want, const std::vector<Bytes>& got) {
           return float_difference(dtype, want, got);
         }},
        false);
  }
}

// An empty tensor has no address.
void nothing() {
  for (const Level* level : machine_levels()) {
    if (level->quantize_4bit == nullptr) continue;
    Random random(1);
    const Bytes book = codebook(random, false);
    const Buffer levels(1024, Place::heap);
    for (size_t i = 0; i < book.size(); ++i) levels.at<unsigned char>()[i] = book[i];
    const float* values = levels.at<float>();
    const DType d = DType::float32;
    const char* errors[] = {
        level->quantize_4bit(nullptr, d, 0, Format::nf4, 64, nullptr, nullptr, 2),
        level->dequantize_4bit({nullptr, {nullptr, nullptr, nullptr, nullptr}, Format::nf4, 64}, nullptr, d,
                               0, 2),
        level->quantize_8bit(nullptr, d, 0, values, 64, nullptr, nullptr, 2),
        level->dequantize_8bit(nullptr, nullptr, values, 64, nullptr, d, 0, 2),
        level->quantize_int8_rows(nullptr, d, 0, 0, 6.0f, nullptr, nullptr, nullptr, 2),
        level->dequantize_int8(nullptr, true, nullptr, nullptr, nullptr, nullptr, d, 0, 0, 2),
    };
    for (const char* error : errors) {
      count_call();
      if (error != nullptr) fail(std::string(level->name) + ", an empty tensor: " + error);
    }
  }
}

}  // namespace

void check_elementwise() {
  Random random(20240);
  nothing();
  for (const DType dtype : kDTypes) {
    for (const int64_t count : kSizes) {
      for (const int64_t blocksize : {32, 64, 128, 4096}) {
        if (count > 5000 && blocksize == 128) continue;
        for (const int special : {0, 8}) {
          fourbit(random, dtype, count, Format::nf4, blocksize, special);
          fourbit(random, dtype, count, Format::fp4, blocksize, special);
        }
      }
      for (const int64_t blocksize : {1, 7, 64, 100, 256, 4096}) {
        if (count > 5000 && blocksize < 64) continue;
        eightbit(random, dtype, count, blocksize, false, 4);
        eightbit(random, dtype, count, blocksize, true, 4);
      }
    }
    // Large outputs bypass the caches if they begin at a multiple of 64, as these do where they end with a
    // page.
    fourbit(random, dtype, (int64_t{4} << 20) / size_of(dtype) + 96, Format::nf4, 64, 0);
    eightbit(random, dtype, (int64_t{4} << 20) / size_of(dtype) + 96, 256, false, 0);
    for (const int64_t rows : {0, 1, 2, 5, 33}) {
      for (const int64_t k : {0, 1, 7, 8, 9, 15, 16, 17, 33, 64, 100, 2049}) {
        int8_rows(random, dtype, rows, k, 0.0f, 2);
        int8_rows(random, dtype, rows, k, 2.5f, 2);
      }
    }
    int8_rows(random, dtype, 3, 70001, 3.5f, 1);
  }
}

}  // namespace halfbyte::check
