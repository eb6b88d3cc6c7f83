// check.cpp: see check.h.
#include "check.h"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "../vec_plain.h"

namespace halfbyte::check {

uint64_t Random::next() {  // splitmix64
  uint64_t z = state_ += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

float Random::normal() {
  float sum = -6.0f;
  for (int i = 0; i < 6; ++i) {
    const uint64_t bits = next();
    sum += static_cast<float>(bits & 0xffffffu) / 16777216.0f;
    sum += static_cast<float>(bits >> 40) / 16777216.0f;
  }
  return sum;
}

void put(void* to, DType dtype, int64_t i, float value) {
  switch (dtype) {
    case DType::float32:
      return cpu::narrow(static_cast<float*>(to) + i, value);
    case DType::float16:
      return cpu::narrow(static_cast<cpu::Half*>(to) + i, value);
    case DType::bfloat16:
      return cpu::narrow(static_cast<cpu::BFloat*>(to) + i, value);
  }
}

float get(const void* from, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::float32:
      return cpu::read<float>(static_cast<const float*>(from) + i);
    case DType::float16:
      return cpu::widen(cpu::read<cpu::Half>(static_cast<const cpu::Half*>(from) + i));
    case DType::bfloat16:
      return cpu::widen(cpu::read<cpu::BFloat>(static_cast<const cpu::BFloat*>(from) + i));
  }
  return 0.0f;
}

Bytes floats(Random& random, int64_t count, DType dtype, int special) {
  using Limits = std::numeric_limits<float>;
  static const float odd[] = {Limits::infinity(),
                              -Limits::infinity(),
                              Limits::quiet_NaN(),
                              -Limits::quiet_NaN(),
                              0.0f,
                              -0.0f,
                              Limits::denorm_min(),
                              6.0e-8f,
                              60000.0f,
                              -60000.0f,
                              Limits::max(),
                              -Limits::max()};
  Bytes out(static_cast<size_t>(count * size_of(dtype)));
  for (int64_t i = 0; i < count; ++i) {
    const bool strange = random.below(64) < special;
    put(out.data(), dtype, i, strange ? odd[random.below(sizeof odd / sizeof odd[0])] : random.normal());
  }
  return out;
}

Bytes bytes(Random& random, int64_t count) {
  Bytes out(static_cast<size_t>(count));
  for (unsigned char& b : out) b = static_cast<unsigned char>(random.next() >> 32);
  return out;
}

// Ascending from -1 to 1 like the dynamic map; `crowded` has levels too close for the table of eightbit.h.
Bytes codebook(Random& random, bool crowded) {
  Bytes out(256 * sizeof(float));
  for (int i = 0; i < 256; ++i) {
    const float t = static_cast<float>(i - 127) / 128.0f;
    const float value =
        crowded ? 0.5f + t * 1.0e-4f : t * std::fabs(t) + static_cast<float>(random.below(2)) * 1.0e-6f;
    put(out.data(), DType::float32, i, i == 255 ? 1.0f : value);
  }
  return out;
}

Packed packed_weight(Random& random, int64_t count, Format format, int64_t blocksize, bool nested) {
  const int64_t blocks = (count + blocksize - 1) / blocksize;
  Packed w{bytes(random, (count + 1) / 2), {}, {}, {}, {}, format, blocksize};
  if (!nested) {
    w.absmax = floats(random, blocks, DType::float32, 0);
    return w;
  }
  w.absmax = bytes(random, blocks);
  w.nested = floats(random, (blocks + 255) / 256, DType::float32, 0);
  w.codebook = codebook(random, false);
  w.offset = floats(random, 1, DType::float32, 0);
  return w;
}

const std::vector<const Level*>& machine_levels() {
  static const std::vector<const Level*> found = [] {
    int count;
    const Level* const* all = cpu::levels(&count);
    std::vector<const Level*> levels;
    for (int i = 0; i < count; ++i) {
      if (cpu::supports(all[i]->name)) levels.push_back(all[i]);
    }
    return levels;
  }();
  return found;
}

namespace {

int64_t failed = 0, called = 0;

std::string where(const Case& c, const Level& level, Place place, int threads) {
  static const char* const places[] = {"heap", "odd address", "page end"};
  return c.name + ", " + level.name + ", " + places[static_cast<int>(place)] +
         ", threads=" + std::to_string(threads) + ": ";
}

std::vector<Bytes> call(const Case& c, const Level& level, Place place, int threads) {
  std::vector<Buffer> in, out;
  Pointers from, to;
  for (const Bytes& b : c.in) {
    in.emplace_back(static_cast<int64_t>(b.size()), place);
    from.push_back(in.back().at());
    if (!b.empty()) std::memcpy(from.back(), b.data(), b.size());
  }
  for (int64_t size : c.out) {
    out.emplace_back(size, place);
    to.push_back(out.back().at());
  }
  count_call();
  if (const char* error = c.call(level, from, to, threads)) fail(where(c, level, place, threads) + error);
  for (size_t i = 0; i < in.size(); ++i) {
    if (!c.in[i].empty() && std::memcmp(from[i], c.in[i].data(), c.in[i].size()) != 0) {
      fail(where(c, level, place, threads) + "input " + std::to_string(i) + " was changed");
    }
  }
  std::vector<Bytes> results;
  for (const Buffer& b : out) {
    results.emplace_back(b.at<unsigned char>(), b.at<unsigned char>() + b.bytes());
  }
  return results;
}

std::string first_difference(const std::vector<Bytes>& want, const std::vector<Bytes>& got) {
  for (size_t i = 0; i < want.size(); ++i) {
    for (size_t j = 0; j < want[i].size(); ++j) {
      if (want[i][j] == got[i][j]) continue;
      return "byte " + std::to_string(j) + " of output " + std::to_string(i) + " is " +
             std::to_string(got[i][j]) + ", the scalar level gives " + std::to_string(want[i][j]);
    }
  }
  return {};
}

}  // namespace

std::string float_difference(DType dtype, const std::vector<Bytes>& want, const std::vector<Bytes>& got) {
  for (int64_t i = 0; i < static_cast<int64_t>(want[0].size()) / size_of(dtype); ++i) {
    const float a = get(want[0].data(), dtype, i), b = get(got[0].data(), dtype, i);
    if (a == b || (a != a && b != b)) continue;
    return "value " + std::to_string(i) + " is " + std::to_string(b) + ", the scalar level gives " +
           std::to_string(a);
  }
  return {};
}

std::vector<Bytes> run(Random& random, const Case& c, bool thorough) {
  constexpr Place places[] = {Place::heap, Place::odd, Place::page};
  const std::vector<Bytes> want = call(c, *machine_levels().front(), Place::heap, 1);
  for (const Level* level : machine_levels()) {
    if (!c.takes(*level)) continue;
    const int64_t drawn = random.below(6);
    for (int64_t i = 0; i < 6; ++i) {
      if (!thorough && i != drawn) continue;
      const Place place = places[i / 2];
      const int threads = static_cast<int>(i % 2) + 1;
      const std::vector<Bytes> got = call(c, *level, place, threads);
      const std::string text = c.differs ? c.differs(want, got) : first_difference(want, got);
      if (!text.empty()) fail(where(c, *level, place, threads) + text);
    }
  }
  return want;
}

void fail(const std::string& sentence) {
  if (++failed <= 20) std::fprintf(stderr, "%s\n", sentence.c_str());
}
int64_t failures() { return failed; }
int64_t calls() { return called; }
void count_call() { ++called; }

void timed(const std::string& name, const std::function<void()>& part) {
  const auto start = std::chrono::steady_clock::now();
  const int64_t before = calls();
  part();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("%-36s %8lld calls %8.1f s\n", name.c_str(), static_cast<long long>(calls() - before),
              seconds.count());
  std::fflush(stdout);
}

}  // namespace halfbyte::check
