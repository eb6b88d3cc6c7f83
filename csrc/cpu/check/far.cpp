// far.cpp: the kernels themselves past 2^31 and 2^32 elements, in some megabytes of memory.
//
// Far       a tensor of kRepeats windows and a tail, where all windows are one piece of memory (Repeated).
// Near      the same window and tail, once each: what the far call has to give for any window and for the
//           tail.  A position that is cut to 32 bits leaves the tail unwritten, or hits memory without
//           access.
// Results that are small (a row's maximum, y of one row) are ordinary memory and compared window by window.
#include <algorithm>
#include <cstring>

#include "check.h"

namespace halfbyte::check {
namespace {

constexpr int64_t kWindow = int64_t{1} << 20, kTail = 8192;  // elements
constexpr int64_t kRepeats = 4096;                           // 2^32 elements
constexpr int64_t kBlock = 4096;
constexpr int kThreads = 2;
constexpr DType kType = DType::bfloat16;

void expect(const Level& level, const char* what, const char* error, bool equal) {
  count_call();
  if (error != nullptr) fail(std::string("far ") + what + ", " + level.name + ": " + error);
  if (error == nullptr && !equal)
    fail(std::string("far ") + what + ", " + level.name + ": another result than near");
}

void fill(const Repeated& to, const Bytes& from) {
  std::memcpy(to.near(), from.data(), std::min(from.size(), static_cast<size_t>(to.near_bytes())));
}

bool same(const void* a, const void* b, int64_t bytes) {
  return std::memcmp(a, b, static_cast<size_t>(bytes)) == 0;
}

// `rows` times (`repeats` times the window, then the tail): ordinary memory with the pattern of Repeated.
template <class T>
std::vector<T> pattern(const std::vector<T>& near, int64_t window, int64_t repeats, int64_t rows = 1) {
  std::vector<T> out;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < repeats; ++i) out.insert(out.end(), near.begin(), near.begin() + window);
    out.insert(out.end(), near.begin() + window, near.end());
  }
  return out;
}

template <class T>
bool same_pattern(const std::vector<T>& far, const std::vector<T>& near, int64_t window, int64_t repeats) {
  return far == pattern(near, window, repeats);
}

std::vector<float> numbers(Random& random, int64_t count) {
  std::vector<float> out;
  for (int64_t i = 0; i < count; ++i) out.push_back(random.normal());
  return out;
}

// A Repeated of elements of `size` bits, filled at random.
struct Region : Repeated {
  Region(Random& random, int64_t bits, int64_t window = kWindow, int64_t tail = kTail,
         int64_t repeats = kRepeats, int64_t rows = 1)
      : Repeated(rows, repeats, window * bits / 8, tail * bits / 8) {
    if (ok()) fill(*this, bytes(random, near_bytes()));
  }
  Bytes content() const { return Bytes(near<unsigned char>(), near<unsigned char>() + near_bytes()); }
};

void set_floats(Random& random, const Repeated& to) {
  fill(to, floats(random, to.near_bytes() / 2, kType, 0));
}

void quantize_4bit(Random& random, const Level& level) {
  constexpr int64_t odd = 3, window_blocks = kWindow / kBlock;  // the last block is not a whole one
  const Region x(random, 16), packed(random, 4);
  if (!x.ok() || !packed.ok()) return fail("no address space for the far part");
  set_floats(random, x);
  const Bytes before = packed.content();
  std::vector<float> near(window_blocks + kTail / kBlock), far(kRepeats * window_blocks + kTail / kBlock);
  level.quantize_4bit(x.near(), kType, kWindow + kTail - odd, Format::nf4, kBlock, packed.near<uint8_t>(),
                      near.data(), kThreads);
  const Bytes want = packed.content();
  fill(packed, before);
  const char* error = level.quantize_4bit(x.at(), kType, kRepeats * kWindow + kTail - odd, Format::nf4,
                                          kBlock, packed.at<uint8_t>(), far.data(), kThreads);
  expect(level, "quantize_4bit", error,
         packed.content() == want && same_pattern(far, near, window_blocks, kRepeats));
}

void dequantize_4bit(Random& random, const Level& level) {
  constexpr int64_t window_blocks = kWindow / kBlock;
  static_assert(window_blocks % 256 == 0, "windows share the nested absmax");
  const Region out(random, 16), packed(random, 4);
  if (!out.ok() || !packed.ok()) return fail("no address space for the far part");
  const Bytes before = out.content(), codes = bytes(random, window_blocks + kTail / kBlock);
  const Bytes book = codebook(random, false), far_codes = pattern(codes, window_blocks, kRepeats);
  const std::vector<float> nested = numbers(random, 2), far_nested = pattern(nested, 1, kRepeats);
  const float offset = 0.25f;
  std::vector<float> table(256);
  std::memcpy(table.data(), book.data(), book.size());
  level.dequantize_4bit(
      {packed.near<uint8_t>(), {codes.data(), nested.data(), table.data(), &offset}, Format::nf4, kBlock},
      out.near(), kType, kWindow + kTail - 1, kThreads);
  const Bytes want = out.content();
  fill(out, before);
  const char* error = level.dequantize_4bit({packed.at<uint8_t>(),
                                             {far_codes.data(), far_nested.data(), table.data(), &offset},
                                             Format::nf4,
                                             kBlock},
                                            out.at(), kType, kRepeats * kWindow + kTail - 1, kThreads);
  expect(level, "dequantize_4bit", error, out.content() == want);
}

void eightbit(Random& random, const Level& level) {
  constexpr int64_t window_blocks = kWindow / kBlock,
                    repeats = kRepeats / 2;  // 2^31: the slowest under a sanitizer
  const Region x(random, 16, kWindow, kTail, repeats), codes(random, 8, kWindow, kTail, repeats);
  if (!x.ok() || !codes.ok()) return fail("no address space for the far part");
  set_floats(random, x);
  const Bytes book = codebook(random, false), before = codes.content();
  std::vector<float> table(256), near(window_blocks + kTail / kBlock),
      far(repeats * window_blocks + kTail / kBlock);
  std::memcpy(table.data(), book.data(), book.size());
  level.quantize_8bit(x.near(), kType, kWindow + kTail - 3, table.data(), kBlock, codes.near<uint8_t>(),
                      near.data(), kThreads);
  const Bytes want = codes.content();
  fill(codes, before);
  const char* error = level.quantize_8bit(x.at(), kType, repeats * kWindow + kTail - 3, table.data(), kBlock,
                                          codes.at<uint8_t>(), far.data(), kThreads);
  expect(level, "quantize_8bit", error,
         codes.content() == want && same_pattern(far, near, window_blocks, repeats));

  const Bytes source = x.content();
  level.dequantize_8bit(codes.near<uint8_t>(), near.data(), table.data(), kBlock, x.near(), kType,
                        kWindow + kTail - 3, kThreads);
  const Bytes values = x.content();
  fill(x, source);
  error = level.dequantize_8bit(codes.at<uint8_t>(), far.data(), table.data(), kBlock, x.at(), kType,
                                repeats * kWindow + kTail - 3, kThreads);
  expect(level, "dequantize_8bit", error, x.content() == values);
}

void int8_rows(Random& random, const Level& level) {
  constexpr int64_t k = 4096, window_rows = kWindow / k, tail_rows = kTail / k;
  const Region x(random, 16), q(random, 8);
  if (!x.ok() || !q.ok()) return fail("no address space for the far part");
  set_floats(random, x);
  put(x.near(), kType, kWindow + kTail - 100,
      77.0f);  // an outlier in the last row marks a column of all rows
  std::vector<float> near(window_rows + tail_rows), far(kRepeats * window_rows + tail_rows);
  Bytes mask(k), far_mask(k);
  const Bytes before = q.content();
  level.quantize_int8_rows(x.near(), kType, window_rows + tail_rows, k, 70.0f, q.near<int8_t>(), near.data(),
                           mask.data(), kThreads);
  const Bytes want = q.content();
  fill(q, before);
  const char* error = level.quantize_int8_rows(x.at(), kType, kRepeats * window_rows + tail_rows, k, 70.0f,
                                               q.at<int8_t>(), far.data(), far_mask.data(), kThreads);
  expect(level, "quantize_int8_rows", error,
         q.content() == want && mask == far_mask && same_pattern(far, near, window_rows, kRepeats));

  const Region sums(random, 32);
  if (!sums.ok()) return fail("no address space for the far part");
  const std::vector<float> columns = numbers(random, k), bias = numbers(random, k);
  const Bytes source = x.content();
  level.dequantize_int8(sums.near(), true, near.data(), columns.data(), bias.data(), x.near(), kType,
                        window_rows + tail_rows, k, kThreads);
  const Bytes values = x.content();
  fill(x, source);
  error = level.dequantize_int8(sums.at(), true, far.data(), columns.data(), bias.data(), x.at(), kType,
                                kRepeats * window_rows + tail_rows, k, kThreads);
  expect(level, "dequantize_int8", error, x.content() == values);
}

// y of `m` rows over a far weight: each row has the pattern.
template <class T>
bool rows_repeat(const std::vector<T>& far, const std::vector<T>& near, int64_t m, int64_t window) {
  const int64_t wide = static_cast<int64_t>(far.size()) / m, narrow = static_cast<int64_t>(near.size()) / m;
  for (int64_t i = 0; i < m; ++i) {
    const std::vector<T> a(far.begin() + i * wide, far.begin() + (i + 1) * wide);
    const std::vector<T> b(near.begin() + i * narrow, near.begin() + (i + 1) * narrow);
    if (!same_pattern(a, b, window, kRepeats)) return false;
  }
  return true;
}

void linear_4bit(Random& random, const Level& level) {
  constexpr int64_t k = kTail, window_rows = kWindow / k, n = window_rows + 1,
                    far_n = kRepeats * window_rows + 1;
  const Region weight(random, 4);
  if (!weight.ok()) return fail("no address space for the far part");
  const std::vector<float> absmax = numbers(random, n * k / kBlock);
  const std::vector<float> far_absmax = pattern(absmax, window_rows * k / kBlock, kRepeats);
  const cpu::Weight4 near{
      weight.near<uint8_t>(), {absmax.data(), nullptr, nullptr, nullptr}, Format::nf4, kBlock};
  const cpu::Weight4 far{
      weight.at<uint8_t>(), {far_absmax.data(), nullptr, nullptr, nullptr}, Format::nf4, kBlock};
  for (const int64_t m : {1, 5}) {  // decoded in registers, and tile by tile
    const Bytes x = floats(random, m * k, kType, 0);
    std::vector<uint16_t> y(static_cast<size_t>(m * n)), far_y(static_cast<size_t>(m * far_n));
    level.linear_4bit(x.data(), kType, near, nullptr, m, n, k, y.data(), kThreads);
    const char* error = level.linear_4bit(x.data(), kType, far, nullptr, m, far_n, k, far_y.data(), kThreads);
    expect(level, m == 1 ? "linear_4bit, N * K, M=1" : "linear_4bit, N * K, M=5", error,
           rows_repeat(far_y, y, m, window_rows));
  }

  // Now x is far: its rows are the windows' rows.
  constexpr int64_t few = 3;
  const Region x(random, 16);
  if (!x.ok()) return fail("no address space for the far part");
  set_floats(random, x);
  std::vector<uint16_t> y(n * few), far_y(far_n * few);
  level.linear_4bit(x.near(), kType, near, nullptr, n, few, k, y.data(), kThreads);
  const char* error = level.linear_4bit(x.at(), kType, near, nullptr, far_n, few, k, far_y.data(), kThreads);
  expect(level, "linear_4bit, M * K", error, same_pattern(far_y, y, window_rows * few, kRepeats));
}

void linear_4bit_backward(Random& random, const Level& level) {
  constexpr int64_t m = 5, n = 5, repeats = kRepeats / 4, k = kWindow + kTail,
                    far_k = repeats * kWindow + kTail;
  constexpr int64_t blocks = k / kBlock, window_blocks = kWindow / kBlock;
  const Region weight(random, 4, kWindow, kTail, repeats, n), dx(random, 16, kWindow, kTail, repeats, m);
  if (!weight.ok() || !dx.ok()) return fail("no address space for the far part");
  // All rows of the weight are one row; dx keeps what was written last, so all rows of dy are one too.
  const std::vector<float> absmax = numbers(random, blocks);
  const std::vector<float> near_absmax = pattern(absmax, window_blocks, 1, n);
  const std::vector<float> far_absmax = pattern(absmax, window_blocks, repeats, n);
  Bytes dy = floats(random, n, kType, 0), packed = weight.content(), row = dy, near_packed;
  for (int64_t i = 1; i < m; ++i) dy.insert(dy.end(), row.begin(), row.end());
  for (int64_t i = 0; i < n; ++i) near_packed.insert(near_packed.end(), packed.begin(), packed.end());
  Bytes near_dx(static_cast<size_t>(m * k * 2));
  level.linear_4bit_backward(
      dy.data(), kType,
      {near_packed.data(), {near_absmax.data(), nullptr, nullptr, nullptr}, Format::nf4, kBlock}, m, n, k,
      near_dx.data(), kThreads);
  const char* error = level.linear_4bit_backward(
      dy.data(), kType,
      {weight.at<uint8_t>(), {far_absmax.data(), nullptr, nullptr, nullptr}, Format::nf4, kBlock}, m, n,
      far_k, dx.at(), kThreads);
  expect(level, "linear_4bit_backward", error, same(dx.near(), near_dx.data(), dx.near_bytes()));
}

void int8_products(Random& random, const Level& level) {
  constexpr int64_t k = 4096, window_rows = kWindow / k, tail_rows = kTail / k;
  constexpr int64_t n = window_rows + tail_rows, far_n = kRepeats * window_rows + tail_rows;
  const Region b(random, 8);
  if (!b.ok()) return fail("no address space for the far part");
  const Bytes a = bytes(random, 2 * k);
  std::vector<int32_t> near(2 * n), far(2 * far_n);
  const int8_t* rows = static_cast<const int8_t*>(static_cast<const void*>(a.data()));
  level.matmul_int8(rows, b.near<int8_t>(), 2, n, k, near.data(), kThreads);
  const char* error = level.matmul_int8(rows, b.at<int8_t>(), 2, far_n, k, far.data(), kThreads);
  expect(level, "matmul_int8, N * K", error, rows_repeat(far, near, 2, window_rows));

  const std::vector<float> absmax = numbers(random, n), far_absmax = pattern(absmax, window_rows, kRepeats);
  const Bytes x = floats(random, k, kType, 0);
  for (const bool exact : {true, false}) {
    std::vector<uint16_t> y(n), far_y(far_n);
    level.linear_int8(x.data(), kType, b.near<int8_t>(), absmax.data(), nullptr, 3.0f, exact, 1, n, k,
                      y.data(), kThreads);
    error = level.linear_int8(x.data(), kType, b.at<int8_t>(), far_absmax.data(), nullptr, 3.0f, exact, 1,
                              far_n, k, far_y.data(), kThreads);
    expect(level, exact ? "linear_int8 exact, N * K" : "linear_int8 w8a16, N * K", error,
           same_pattern(far_y, y, window_rows, kRepeats));
  }

  // A far result: M * N, past 2^31.
  constexpr int64_t depth = 64, wide = 1024, window_m = 256, tail_m = 64, repeats = kRepeats * 2;
  const Region left(random, 8 * depth, window_m, tail_m, repeats),
      out(random, 32 * wide, window_m, tail_m, repeats);
  if (!left.ok() || !out.ok()) return fail("no address space for the far part");
  const Bytes before = out.content();
  level.matmul_int8(left.near<int8_t>(), b.near<int8_t>(), window_m + tail_m, wide, depth,
                    out.near<int32_t>(), kThreads);
  const Bytes want = out.content();
  fill(out, before);
  error = level.matmul_int8(left.at<int8_t>(), b.near<int8_t>(), repeats * window_m + tail_m, wide, depth,
                            out.at<int32_t>(), kThreads);
  expect(level, "matmul_int8, M * N", error, out.content() == want);
}

// The first step of momentum with a step of length 0 leaves the parameter and makes the gradient the state, however
// often a window is run over; only then may windows be one piece of memory that is read and written.
void updates(Random& random, const Level& level, bool coded) {
  constexpr int64_t window_blocks = kWindow / kBlock, repeats = kRepeats / 2;
  const Region param(random, 16, kWindow, kTail, repeats), grad(random, 16, kWindow, kTail, repeats),
      state(random, coded ? 8 : 32, kWindow, kTail, repeats);
  if (!param.ok() || !grad.ok() || !state.ok()) return fail("no address space for the far part");
  set_floats(random, param);
  set_floats(random, grad);
  const Bytes book = codebook(random, false);
  std::vector<float> table(256), near(window_blocks + kTail / kBlock),
      far(repeats * window_blocks + kTail / kBlock);
  std::memcpy(table.data(), book.data(), book.size());
  if (!coded) fill(state, Bytes(static_cast<size_t>(state.near_bytes())));
  const Bytes before = state.content(), kept = param.content();
  const auto call = [&](void* p, void* g, void* s, float* absmax, int64_t count) {
    const cpu::UpdateTensor tensor = {p, g, s, nullptr, absmax, nullptr, nullptr, count, 0};
    cpu::Update update = {};
    update.optimizer = Optimizer::momentum;
    update.dtype = kType;
    update.c.decay = update.grad_scale = 1.0f;
    update.blocksize = coded ? kBlock : 0;
    update.codebook1 = table.data();
    update.tensors = &tensor;
    update.size = 1;
    return coded ? level.update_8bit(update, kThreads) : level.update_32bit(update, kThreads);
  };
  call(param.near(), grad.near(), state.near(), near.data(), kWindow + kTail - 3);
  const Bytes want = state.content();
  fill(state, before);
  const char* error = call(param.at(), grad.at(), state.at(), far.data(), repeats * kWindow + kTail - 3);
  expect(level, coded ? "update_8bit" : "update_32bit", error,
         state.content() == want && want != before && param.content() == kept &&
             same_pattern(far, near, window_blocks, repeats));
}

void update_32bit(Random& random, const Level& level) { updates(random, level, false); }
void update_8bit(Random& random, const Level& level) { updates(random, level, true); }

}  // namespace

void check_far(bool all) {
  Random random(20242);
  const auto each = [&](const char* name, auto function, auto check) {
    const std::vector<const Level*>& levels = machine_levels();
    for (auto level = levels.rbegin(); level != levels.rend(); ++level) {
      if ((*level)->*function == nullptr) continue;
      timed(std::string("  ") + name + ", " + (*level)->name, [&] { check(random, **level); });
      if (!all) return;
    }
  };
  each("4-bit quantization", &Level::quantize_4bit, quantize_4bit);
  each("4-bit dequantization", &Level::dequantize_4bit, dequantize_4bit);
  each("8-bit, both ways", &Level::quantize_8bit, eightbit);
  each("int8 rows, both ways", &Level::quantize_int8_rows, int8_rows);
  each("linear_4bit", &Level::linear_4bit, linear_4bit);
  each("linear_4bit_backward", &Level::linear_4bit_backward, linear_4bit_backward);
  each("int8 products", &Level::matmul_int8, int8_products);
  each("update_32bit", &Level::update_32bit, update_32bit);
  each("update_8bit", &Level::update_8bit, update_8bit);
}

}  // namespace halfbyte::check
