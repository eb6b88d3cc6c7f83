// codes8.cuh: 8-bit codes of any ascending codebook, decoded and encoded by tables in shared memory.
//
// Encoding  The code of q is how many of 255 thresholds it exceeds; a tie goes to the even code, as its threshold
//           is put just below it where the even code is the upper one.  For |q| from 2^-24 to 1 a bin is five
//           bits of the exponent and the first bits of the mantissa, with at most one threshold.  Seen from the
//           bin's lower end it holds
//             bits 31..24  code there
//             bits 23..0   2^24 - (place of the threshold + 1), so that adding the place of q carries into the
//                          code where q is above; 0 where there is no threshold
//           less what all numbers of the bin share, so that no bit need be masked before adding.  The order is
//           that of numbers: for negative q bits are inverted.  A codebook that does not fit (two thresholds in
//           a bin, or one below 2^-24) takes a binary search instead.
#pragma once
#include "portable.cuh"

namespace halfbyte::gpu {

HALFBYTE_DEVICE uint32_t ordered_bits(float f) {
  const uint32_t bits = as_bits(f);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

// One codebook.  kSigned: 2 x 2048 bins for both signs; otherwise 4096 for positive q, twice as fine.
template <bool kSigned>
struct Codes8 {
  static constexpr int kBits = kSigned ? 17 : 16;  // of the place within a bin
  static constexpr int kBins = 4096, kBinades = 32, kFirst = 7, kFine = 1 << (23 - kBits);
  static constexpr uint32_t kPlace = (1u << kBits) - 1u, kUnit = 1u << (24 - kBits), kTiny = 0x33800000u;

  uint32_t bin[kBins];
  float level[256];
  uint32_t threshold[256];  // ordered integers, ascending; the last one is above all
  uint32_t zero;            // the code of 0
  int negative;             // levels below zero
  int searched;             // whether the bins are of no use

  // Every thread of the block calls this, then waits.  Holds barriers itself.
  HALFBYTE_DEVICE void fill(const float* codebook) {
    if (threadIdx.x == 0) {
      searched = 0;
      int below = 0;
      for (int step = 128; step > 0; step /= 2) {  // ascending: those with a sign come first
        if (as_bits(codebook[below + step - 1]) >> 31) below += step;
      }
      below += static_cast<int>(as_bits(codebook[below]) >> 31);
      negative = below;
    }
    for (int j = static_cast<int>(threadIdx.x); j < 256; j += static_cast<int>(blockDim.x)) {
      level[j] = codebook[j];
      threshold[j] = j == 255 ? 0xffffffffu : threshold_of(codebook, j);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      const float tiny = as_float(kTiny), least = as_float(1u);
      zero = rank(ordered_bits(0.0f));
      bool fits = rank(ordered_bits(tiny)) == zero && nudged(zero, 0u) == zero;
      if (kSigned) {
        const uint32_t high = nudged(rank(ordered_bits(-least)), 1u);
        fits = fits && nudged(rank(ordered_bits(-tiny)), 1u) == high;
      } else {
        fits = fits && negative == 0;
      }
      if (!fits) searched = 1;
    }
    __syncthreads();
    bool crowded = false;
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += static_cast<int>(blockDim.x)) {
      const uint32_t binade = static_cast<uint32_t>(i) / kFine % kBinades;
      if (binade < kFirst) continue;
      const uint32_t sign = kSigned ? static_cast<uint32_t>(i) / (kFine * kBinades) : 0u;
      const uint32_t low = (binade | 96u) << 23 | static_cast<uint32_t>(i) % kFine << kBits;
      const uint32_t shared = (low ^ (0u - sign)) / (kPlace + 1u) * (kPlace + 1u) * kUnit;
      if (binade == kBinades - 1) {  // 1 alone
        bin[i] = (nudged(rank(ordered_bits(sign ? -1.0f : 1.0f)), sign) << 24) - shared;
        continue;
      }
      const uint32_t from = sign ? ~(0x80000000u | low | kPlace) : 0x80000000u | low;
      const uint32_t base = rank(from), code = nudged(base, sign);
      uint32_t place = kPlace;
      if (base < 255u && threshold[base] - from < kPlace) {
        const uint32_t above = nudged(base + 1u, sign);
        if (above != code) place = threshold[base] - from;
        crowded = crowded || above > code + 1u || threshold[base + 1u] - from < kPlace;
      }
      bin[i] = (code << 24 | (0x1000000u - (place + 1u) * kUnit)) - shared;
    }
    if (crowded) searched = 1;
  }

  // From ordered integers; the last of them is exceeded by none.
  HALFBYTE_DEVICE uint32_t rank(uint32_t ordered) const {
    uint32_t below = 0;
    HALFBYTE_UNROLL
    for (uint32_t step = 128; step > 0; step /= 2) {
      if (ordered > threshold[below + step - 1]) below += step;
    }
    return below;
  }

  // The code beside it where a level's sign is not its number's, in a codebook that has signs.
  HALFBYTE_DEVICE uint32_t nudged(uint32_t code, uint32_t sign) const {
    if (negative == 0) return code;
    const bool below = static_cast<int>(code) < negative;
    if (sign && !below) return code == 0u ? 0u : code - 1u;
    if (!sign && below) return code == 255u ? 255u : code + 1u;
    return code;
  }

  static HALFBYTE_DEVICE uint32_t threshold_of(const float* codebook, int j) {
    const float middle = (codebook[j] + codebook[j + 1]) * 0.5f;
    const bool repeated = j > 0 && middle == (codebook[j - 1] + codebook[j]) * 0.5f;
    uint32_t t = ordered_bits(middle == 0.0f ? 0.0f : middle);  // +0.0 for either zero
    // A repeated midpoint never decides a tie; below +0.0 stands -0.0, which ties as well.
    if (j % 2 != 0 && !repeated) t -= middle == 0.0f ? 2u : 1u;
    return t;
  }

  // The level of byte `place` of a word.
  HALFBYTE_DEVICE float decode(uint32_t word, int place) const { return level[byte_of(word, place)]; }

  // The code of |q| <= 1 in the upper eight bits; not for NaN.
  HALFBYTE_DEVICE uint32_t encode(float q) const {
    constexpr uint32_t kBelow = (kTiny >> kBits) - kFirst * kFine, kHalf = kFine * kBinades;
    const uint32_t magnitude = as_bits(fmaxf(fabsf(q), as_float(kTiny)));
    if constexpr (kSigned) {
      const uint32_t sign = static_cast<uint32_t>(static_cast<int32_t>(as_bits(q)) >> 31);
      return bin[(magnitude >> kBits) + (sign & kHalf) - kBelow] + (magnitude ^ sign) * kUnit;
    } else {
      return bin[(magnitude >> kBits) - kBelow] + magnitude * kUnit;
    }
  }

  // The same by searching.
  HALFBYTE_DEVICE uint32_t search(float q) const {
    const uint32_t ordered = ordered_bits(q);
    uint32_t code = 0;
    HALFBYTE_ROLL
    for (uint32_t step = 128; step > 0; step /= 2) {
      if (ordered > threshold[code + step - 1]) code += step;
    }
    return (q == 0.0f && as_bits(q) == 0u ? code : nudged(code, as_bits(q) >> 31)) << 24;
  }
};

// The codebooks of a rule: of its first states, and of its second one where it has one.
struct NoCodes {
  static constexpr int searched = 0;
  HALFBYTE_DEVICE float decode(uint32_t, int) const { return 0.0f; }
  HALFBYTE_DEVICE uint32_t encode(float) const { return 0; }
  HALFBYTE_DEVICE uint32_t search(float) const { return 0; }
  HALFBYTE_DEVICE void fill(const float*) {}
};

// The levels of two codebooks once for each of 32 lanes, so that every lane has a bank of its own and one byte
// permutation makes an address: entry `code` for lane l at byte 256 code + 4 l, that of the second 128 bytes further.
struct Spread {
#if defined(HALFBYTE_PLAIN)
  static HALFBYTE_DEVICE void fill(const float*, const float*) {}
  static HALFBYTE_DEVICE float decode(uint32_t, int, bool) { return 0.0f; }
#else
  static constexpr int kBytes = 256 * 256;

  static HALFBYTE_DEVICE void fill(const float* codebook1, const float* codebook2) {
    extern __shared__ __align__(256) char halfbyte_spread[];
    for (unsigned i = threadIdx.x; i < kBytes / 4; i += blockDim.x) {
      reinterpret_cast<float*>(halfbyte_spread)[i] = (i & 32u ? codebook2 : codebook1)[i >> 6];
    }
  }
  static HALFBYTE_DEVICE float decode(uint32_t word, int place, bool of_second) {
    extern __shared__ __align__(256) char halfbyte_spread[];
    const uint32_t at = __byte_perm(word, threadIdx.x % 32 * 4, 0x5504u | static_cast<uint32_t>(place) << 4);
    return *reinterpret_cast<const float*>(halfbyte_spread + (of_second ? 128 : 0) + at);
  }
#endif
};

// kSpread: levels are looked up in Spread, in dynamic shared memory.
template <bool kSecond, bool kSpread = false>
struct Books {
  Codes8<true> first;
  std::conditional_t<kSecond, Codes8<false>, NoCodes> second;

  // Every thread of the block calls this; holds barriers.
  HALFBYTE_DEVICE void fill(const float* codebook1, const float* codebook2) {
    first.fill(codebook1);
    second.fill(codebook2);
    if constexpr (kSpread) Spread::fill(codebook1, kSecond ? codebook2 : codebook1);
    __syncthreads();
  }

  // The level of byte `place` of a word of codes.
  HALFBYTE_DEVICE float level(uint32_t word, int place, bool of_second) const {
    if constexpr (kSpread) {
      return Spread::decode(word, place, of_second);
    } else {
      return of_second ? second.decode(word, place) : first.decode(word, place);
    }
  }
};

}  // namespace halfbyte::gpu
