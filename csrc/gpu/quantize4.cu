// quantize4.cu: fp32, fp16 or bf16 -> packed 4-bit codes and one absmax per block.
//
// Layout    packed[i] holds codes 2i (high nibble) and 2i + 1 (low nibble).
// Work      a thread has 32 bytes of x in registers (16 values, 8 of fp32) and writes 8 or 4 bytes.  A block's
//           maximum goes over blocksize / values lanes: by shuffles, for large blocks by shared memory too.
//           Code of s: 61 bins of equal width hold at most one threshold each, so the bin gives two codes and
//           one comparison chooses.  The table has one copy per lane, in banks of its own.
// Limits    x aligned to 16 bytes, packed to 8; blocksize a power of two, 32 .. 4096.
// Bound by  memory: reads sizeof(T), writes 0.5 byte + 4 / blocksize per value; in bf16 also by the ALU, whose
//           operations are counted here: 6 per value.
// Agrees    bit for bit with the reference: s = x * (1 / absmax), thresholds as they are, ties to below.
#include "blockwise.cuh"
#include "halfbyte/gpu.h"
#include "halfbyte/tables.h"

namespace halfbyte::gpu {
namespace {

constexpr int kBins = 64;
constexpr unsigned kCopies = 32;  // of the table

// A format by its thresholds, padded with infinity, and the codes between them.
struct Encoding {
  float thresholds[15];
  uint8_t order[16];
  uint8_t zero;  // code of 0.0
};

struct Bin {
  float threshold;
  uint32_t codes;  // of s <= threshold: bits 0..3; of s > threshold: bits 4..7
};

// The bin of s, as bits 8..13: 2 + 30 (1 + s), for |s| <= 1 from 2 to 62; NaN is in bin 63.  Rises with s.
HALFBYTE_DEVICE uint32_t bin_bits(float s) {
  const float shifted = fmaf(s, 30.0f * 256.0f, 8388608.0f + 32.0f * 256.0f);
#if defined(HALFBYTE_PLAIN)
  if (s != s) return 63u << 8;  // where NaN keeps its payload
#endif
  return as_bits(shifted) & 0x3f00u;  // NaN is 0x7fffffff
}

HALFBYTE_DEVICE void fill_table(Bin* table, const Encoding& encoding) {
  const int each = static_cast<int>(blockDim.x) / kBins;  // threads that share a bin
  const int bin = static_cast<int>(threadIdx.x) / each;
  int below = 0;
  float threshold = INFINITY;
  for (int i = 0; i < 15; ++i) {
    if (encoding.thresholds[i] == INFINITY) break;
    const int its = static_cast<int>(bin_bits(encoding.thresholds[i]) >> 8);
    below += its < bin;
    if (its == bin) threshold = encoding.thresholds[i];
  }
  const uint32_t low = encoding.order[below], high = encoding.order[below < 15 ? below + 1 : 15];
  const Bin entry = bin == kBins - 1 ? Bin{INFINITY, 0u} : Bin{threshold, low | high << 4};
  for (unsigned lane = threadIdx.x % static_cast<unsigned>(each); lane < kCopies; lane += each) {
    table[bin * kCopies + lane] = entry;
  }
}

template <bool Sign>
HALFBYTE_DEVICE uint32_t encode(float s, const Bin* table) {
  const float value = Sign ? fabsf(s) : s;
  const auto* entry = reinterpret_cast<const char*>(table) + (bin_bits(value) | (threadIdx.x % kCopies * 8u));
  const Bin bin = *reinterpret_cast<const Bin*>(entry);
  uint32_t code = (value > bin.threshold ? bin.codes >> 4 : bin.codes) & 15u;
  if (Sign && s < 0.0f) code |= 8u;
  return code;
}

template <class T, bool Sign, bool Wide>
__global__ void __launch_bounds__(Wide ? 512 : 256)
    quantize_4bit_kernel(const T* __restrict__ x, int64_t count, Encoding encoding, int shift,
                         uint8_t* __restrict__ packed, float* __restrict__ absmax) {
  constexpr int kValues = kChunk<T>;
  __shared__ Bin table[kBins * kCopies];
  fill_table(table, encoding);
  __syncthreads();
  const unsigned lanes = (1u << shift) / kValues;
  const int64_t step = int64_t{gridDim.x} * blockDim.x * kValues;
  // The loop's condition is the block's, so that all threads come to the barriers.
  for (int64_t tile = int64_t{blockIdx.x} * blockDim.x * kValues; tile < count; tile += step) {
    const int64_t first = tile + static_cast<int64_t>(threadIdx.x) * kValues;
    float v[kValues];
    read_chunk(x, first, count, v);
    const float most = neighbours_max<Wide>(magnitude<kValues>(v), lanes);
    if (first >= count) continue;
    if ((threadIdx.x & (lanes - 1)) == 0) absmax[first >> shift] = most;
    const float scale = reciprocal(most);
    Words<kValues / 2> words;
    HALFBYTE_UNROLL
    for (int word = 0; word < kValues / 8; ++word) {
      uint32_t codes = 0;
      HALFBYTE_UNROLL
      for (int i = 0; i < 8; ++i) codes = codes << 4 | encode<Sign>(v[word * 8 + i] * scale, table);
      words.w[word] = reverse_bytes(codes);
    }
    if (first + kValues <= count) {
      store<kValues / 2>(packed + first / 2, words);
      continue;
    }
    HALFBYTE_UNROLL  // so that `words` stays in registers
    for (int i = 0; i < kValues / 2; ++i) {
      uint32_t byte = words.w[i / 4] >> (i % 4 * 8) & 255u;
      if (first + 2 * i + 1 == count) byte = (byte & 0xf0u) | encoding.zero;
      if (first + 2 * i < count) packed[first / 2 + i] = static_cast<uint8_t>(byte);
    }
  }
}

template <int Count>
Encoding encoding_of(const uint32_t (&thresholds)[Count], const uint8_t (&order)[Count + 1], uint8_t zero) {
  Encoding encoding = {};
  for (int i = 0; i < 15; ++i) encoding.thresholds[i] = INFINITY;
  memcpy(encoding.thresholds, thresholds, sizeof thresholds);
  memcpy(encoding.order, order, sizeof order);
  encoding.zero = zero;
  return encoding;
}

template <class T, bool Sign>
const char* launch(const T* x, int64_t count, const Encoding& encoding, int64_t blocksize, uint8_t* packed,
                   float* absmax, void* stream) {
  const int shift = log2_of(blocksize);
  const bool wide = blocksize > group_lanes() * kChunk<T>;
  const int threads = wide ? 512 : 256;
  const int64_t tiles = ceil_div(count, int64_t{threads} * kChunk<T>);
  if (wide) {
    const unsigned grid = grid_for(tiles, resident(quantize_4bit_kernel<T, Sign, true>, 512));
    HALFBYTE_LAUNCH((quantize_4bit_kernel<T, Sign, true>), grid, 512, 0, stream, x, count, encoding, shift,
                    packed, absmax);
  } else {
    const unsigned grid = grid_for(tiles, resident(quantize_4bit_kernel<T, Sign, false>, 256));
    HALFBYTE_LAUNCH((quantize_4bit_kernel<T, Sign, false>), grid, 256, 0, stream, x, count, encoding, shift,
                    packed, absmax);
  }
  return launched();
}

}  // namespace

const char* quantize_4bit(const void* x, DType dtype, int64_t count, Format format, int64_t blocksize,
                          uint8_t* packed, float* absmax, void* stream) {
  return with_dtype(dtype, [&](auto type) {
    const auto* typed = static_cast<const decltype(type)*>(x);
    if (format == Format::fp4) {
      const Encoding encoding = encoding_of(fp4_threshold_bits, fp4_order, 0);
      return launch<decltype(type), true>(typed, count, encoding, blocksize, packed, absmax, stream);
    }
    const Encoding encoding = encoding_of(nf4_threshold_bits, nf4_order, 7);
    return launch<decltype(type), false>(typed, count, encoding, blocksize, packed, absmax, stream);
  });
}

}  // namespace halfbyte::gpu
