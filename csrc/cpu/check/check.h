// check.h: what the parts of halfbyte_cpu_check share: random inputs, a case run by every level, failures.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "halfbyte/cpu.h"
#include "memory.h"

namespace halfbyte::check {

using Bytes = std::vector<unsigned char>;
using cpu::Level;

// A fixed sequence: the same cases on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t next();
  int64_t below(int64_t limit) { return static_cast<int64_t>(next() % static_cast<uint64_t>(limit)); }
  float normal();

 private:
  uint64_t state_;
};

inline constexpr DType kDTypes[] = {DType::float32, DType::float16, DType::bfloat16};

inline int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }
void put(void* to, DType dtype, int64_t i, float value);
float get(const void* from, DType dtype, int64_t i);

// `special` of 64 values are infinite, not a number, zero, subnormal or huge.
Bytes floats(Random& random, int64_t count, DType dtype, int special);
Bytes bytes(Random& random, int64_t count);
Bytes codebook(Random& random, bool crowded);

// A packed 4-bit weight with absmax, nested or not.
struct Packed {
  Bytes packed, absmax, nested, codebook, offset;
  Format format;
  int64_t blocksize;
};
Packed packed_weight(Random& random, int64_t count, Format format, int64_t blocksize, bool nested);

using Pointers = std::vector<void*>;

// One call: what goes in, how large what comes out is, and how close the levels have to be.
struct Case {
  std::string name;
  std::vector<Bytes> in;
  std::vector<int64_t> out;  // sizes in bytes
  std::function<bool(const Level&)> takes;
  std::function<const char*(const Level&, const Pointers& in, const Pointers& out, int threads)> call;
  // An empty text where `got` agrees with the scalar level's `want`; without it all bytes have to be equal.
  std::function<std::string(const std::vector<Bytes>& want, const std::vector<Bytes>& got)> differs;
};

// All values of the only output are equal, any NaN being as good as another.
std::string float_difference(DType dtype, const std::vector<Bytes>& want, const std::vector<Bytes>& got);

// The scalar level's result, after every level that the machine has was compared with it in all places with
// one and two threads (`thorough`) or in one place, drawn at random.
std::vector<Bytes> run(Random& random, const Case& c, bool thorough);

// Levels that the machine has.
const std::vector<const Level*>& machine_levels();

// Prints the sentence and counts it; the program's exit code is 1 then.
void fail(const std::string& sentence);
int64_t failures();
int64_t calls();
void count_call();

// Runs the part and prints its calls and seconds.
void timed(const std::string& name, const std::function<void()>& part);

void check_elementwise();
void check_linear();
void check_optimizer();
// Sizes past 2^31 and 2^32: every op of the highest level that has it or, if `all`, of every level.
void check_far(bool all);

}  // namespace halfbyte::check
