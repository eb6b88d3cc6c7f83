// quantize8.cu: fp32, fp16 or bf16 -> codes of a 256-entry codebook and one absmax per block.
//
// Work      as in quantize4.cu: 32 bytes of x per thread, a byte out per value.  Code of s: the upper 15 bits of
//           a float (sign, exponent, 6 of the mantissa) are a bin; where no bin holds two midpoints, as in all
//           maps that bitsandbytes makes, one word per bin says the code and where in the bin it rises by one:
//               bits 24..31   code, minus the bin's own number, which the value's bits add again
//               bits  7..23   what the value's lower 17 bits must be added to, to carry into the code
//           Other codebooks are searched, in eight steps.
// Limits    x and codes aligned to 16 bytes; blocks of 16 .. 4096 (a power of two) in the fast kernel, any other
//           in one that gives a block to 32 lanes.
// Bound by  memory: reads sizeof(T), writes 1 byte + 4 / blocksize per value; and by the look-up, one word of
//           shared memory per value.
// Agrees    bit for bit with the reference: s = x * (1 / absmax), nearest by fp32 midpoints, ties to even.
#include "blockwise.cuh"
#include "halfbyte/gpu.h"

namespace halfbyte::gpu {
namespace {

constexpr int kMidpoints = 255;
constexpr int kHalf = 24 * 64;  // bins of one sign: 64 for each octave from 2^-23 to 1, 64 for the rest
constexpr int kBins = 2 * (kHalf + 1);  // and the bins that begin at 1.0
constexpr int kLow = 17;                // bits of a value within its bin

// s as an integer that rises with it.  Scaled so that 2^-23 is the smallest normal number: what is smaller falls
// into few bins, and need not be told apart.
HALFBYTE_DEVICE int32_t key_of(float s) {
  const auto bits = static_cast<int32_t>(as_bits(s * 0x1p-103f));
  return bits ^ (bits >> 31 & 0x7fffffff);
}

struct Tables {
  uint32_t bins[kBins];
  float midpoints[kMidpoints];
  int32_t keys[kMidpoints];
  int direct;  // whether `bins` serves
};

// How many of `sorted` are below `value`: 0 .. 255.
template <class T>
HALFBYTE_DEVICE int count_below(const T* sorted, T value) {
  int below = 0;
  HALFBYTE_UNROLL
  for (int step = 128; step > 0; step /= 2) {
    if (sorted[below + step - 1] < value) below += step;
  }
  return below;
}

// Every thread of the block comes here.
HALFBYTE_DEVICE void fill_tables(Tables& tables, const float* codebook) {
  if (threadIdx.x == 0) tables.direct = 1;
  __syncthreads();
  for (unsigned i = threadIdx.x; i < kMidpoints; i += blockDim.x) {
    const float midpoint = (codebook[i] + codebook[i + 1]) * 0.5f;
    tables.midpoints[i] = midpoint;
    tables.keys[i] = key_of(midpoint);
    if (!(fabsf(midpoint) >= 0x1p-23f)) tables.direct = 0;
  }
  __syncthreads();
  for (unsigned i = threadIdx.x; i < kBins; i += blockDim.x) {
    const int bin = static_cast<int>(i) - (kHalf + 1);
    const int64_t first = static_cast<int64_t>(bin) * (1 << kLow), end = first + (1 << kLow);
    const int code = count_below(tables.keys, static_cast<int32_t>(first));
    uint32_t rises = 1u << kLow;  // from which of its values on a bin has the next code: never
    if (code < kMidpoints && tables.keys[code] < end) {
      rises = static_cast<uint32_t>(tables.keys[code] - first) + (code % 2 == 0 ? 1u : 0u);
      if (code + 1 < kMidpoints && tables.keys[code + 1] < end) tables.direct = 0;
    }
    const uint32_t carry = ((1u << kLow) - rises) << (24 - kLow);
    tables.bins[i] = (static_cast<uint32_t>(code - bin) << 24) + carry;
  }
  __syncthreads();
}

// The code in the upper byte.  s is a number of [-1, 1], give or take an ulp.
HALFBYTE_DEVICE uint32_t encode_direct(float s, const Tables& tables) {
  const int32_t key = key_of(s);
  return tables.bins[(key >> kLow) + kHalf + 1] + (static_cast<uint32_t>(key) << (24 - kLow));
}

// Any s, any codebook.
HALFBYTE_DEVICE uint32_t encode_searched(float s, const float* midpoints) {
  if (s != s) return 0;
  const int code = count_below(midpoints, s);
  return static_cast<uint32_t>(code + (code < kMidpoints && s == midpoints[code] && code % 2 == 1 ? 1 : 0));
}

template <class T, bool Wide>
__global__ void __launch_bounds__(Wide ? 512 : 256)
    quantize_8bit_kernel(const T* __restrict__ x, int64_t count, const float* __restrict__ codebook,
                         int shift, uint8_t* __restrict__ codes, float* __restrict__ absmax) {
  constexpr int kValues = kChunk<T>;
  __shared__ Tables tables;
  fill_tables(tables, codebook);
  const bool direct = tables.direct != 0;
  const unsigned lanes = (1u << shift) / kValues;
  const int64_t step = int64_t{gridDim.x} * blockDim.x * kValues;
  for (int64_t tile = int64_t{blockIdx.x} * blockDim.x * kValues; tile < count; tile += step) {
    const int64_t first = tile + static_cast<int64_t>(threadIdx.x) * kValues;
    float v[kValues];
    read_chunk(x, first, count, v);
    const float most = neighbours_max<Wide>(magnitude<kValues>(v), lanes);
    if (first >= count) continue;
    if ((threadIdx.x & (lanes - 1)) == 0) absmax[first >> shift] = most;
    const float scale = reciprocal(most);
    float nan = 0.0f;
    HALFBYTE_UNROLL
    for (int i = 0; i < kValues; ++i) {
      v[i] *= scale;
      nan = fmaf(v[i], 0.0f, nan);  // NaN once one is
    }
    Words<kValues> words;
    if (direct && nan == nan) {
      HALFBYTE_UNROLL
      for (int i = 0; i < kValues; i += 4) {
        words.w[i / 4] = upper_bytes(encode_direct(v[i], tables), encode_direct(v[i + 1], tables),
                                     encode_direct(v[i + 2], tables), encode_direct(v[i + 3], tables));
      }
    } else {
      HALFBYTE_UNROLL
      for (int i = 0; i < kValues; i += 4) {
        uint32_t word = 0;
        for (int j = 3; j >= 0; --j) word = word << 8 | encode_searched(v[i + j], tables.midpoints);
        words.w[i / 4] = word;
      }
    }
    if (first + kValues <= count) {
      store<kValues>(codes + first, words);
      continue;
    }
    HALFBYTE_UNROLL  // so that `words` stays in registers
    for (int i = 0; i < kValues; ++i) {
      if (first + i < count) codes[first + i] = static_cast<uint8_t>(words.w[i / 4] >> (i % 4 * 8) & 255u);
    }
  }
}

// Blocks of any size: each by 32 lanes, which read it twice.
template <class T>
__global__ void __launch_bounds__(256)
    quantize_8bit_any_kernel(const T* __restrict__ x, int64_t count, const float* __restrict__ codebook,
                             int64_t blocksize, uint8_t* __restrict__ codes, float* __restrict__ absmax) {
  __shared__ float midpoints[kMidpoints];
  for (unsigned i = threadIdx.x; i < kMidpoints; i += blockDim.x) {
    midpoints[i] = (codebook[i] + codebook[i + 1]) * 0.5f;
  }
  __syncthreads();
  const int64_t blocks = (count + blocksize - 1) / blocksize;
  const unsigned groups = blockDim.x / kGroup, lane = threadIdx.x % kGroup;
  // The loop's condition is the block's, so that all lanes of a warp shuffle.
  for (int64_t tile = int64_t{blockIdx.x} * groups; tile < blocks; tile += int64_t{gridDim.x} * groups) {
    const int64_t block = tile + threadIdx.x / kGroup;
    const int64_t first = block * blocksize;
    const int64_t end = block < blocks ? (first + blocksize < count ? first + blocksize : count) : first;
    float most = 0.0f;
    for (int64_t i = first + lane; i < end; i += kGroup) most = fmaxf(most, fabsf(widen(x[i])));
    most = neighbours_max<false>(most, kGroup);
    if (lane == 0 && block < blocks) absmax[block] = most;
    const float scale = reciprocal(most);
    for (int64_t i = first + lane; i < end; i += kGroup) {
      codes[i] = static_cast<uint8_t>(encode_searched(widen(x[i]) * scale, midpoints));
    }
  }
}

template <class T>
const char* launch(const T* x, int64_t count, const float* codebook, int64_t blocksize, uint8_t* codes,
                   float* absmax, void* stream) {
  const int shift = log2_of(blocksize);
  if (blocksize < kChunk<T> || blocksize > 4096 || int64_t{1} << shift != blocksize) {
    const unsigned grid = grid_for(ceil_div(ceil_div(count, blocksize), 256 / group_lanes()), 8);
    HALFBYTE_LAUNCH((quantize_8bit_any_kernel<T>), grid, 256, 0, stream, x, count, codebook, blocksize, codes,
                    absmax);
    return launched();
  }
  const bool wide = blocksize > group_lanes() * kChunk<T>;
  const int threads = wide ? 512 : 256;
  const int64_t tiles = ceil_div(count, int64_t{threads} * kChunk<T>);
  if (wide) {
    const unsigned grid = grid_for(tiles, resident(quantize_8bit_kernel<T, true>, 512));
    HALFBYTE_LAUNCH((quantize_8bit_kernel<T, true>), grid, 512, 0, stream, x, count, codebook, shift, codes,
                    absmax);
  } else {
    const unsigned grid = grid_for(tiles, resident(quantize_8bit_kernel<T, false>, 256));
    HALFBYTE_LAUNCH((quantize_8bit_kernel<T, false>), grid, 256, 0, stream, x, count, codebook, shift, codes,
                    absmax);
  }
  return launched();
}

}  // namespace

const char* quantize_8bit(const void* x, DType dtype, int64_t count, const float* codebook, int64_t blocksize,
                          uint8_t* codes, float* absmax, void* stream) {
  return with_dtype(dtype, [&](auto type) {
    return launch(static_cast<const decltype(type)*>(x), count, codebook, blocksize, codes, absmax, stream);
  });
}

}  // namespace halfbyte::gpu
