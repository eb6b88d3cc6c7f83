// fourbit.h: fp32, fp16, bf16 -> packed 4-bit codes with one absmax per block, and back.
//
// Layout    packed[i] holds codes 2 i (high nibble) and 2 i + 1 (low nibble); absmax[b] scales elements
//           b * blocksize .. (b + 1) * blocksize - 1; blocksize is a power of two >= 32.
// Work      chunks of whole blocks are handed to threads; blocks are even, so chunks start on a byte.
// Bound by  memory, in both directions.
// Agrees    bit for bit with the reference.  Encoding compares x * (1 / absmax) with the thresholds; decoding
//           looks codes up in the block's sixteen products level * absmax, each rounded once.
#pragma once
#include "prelude.h"

namespace halfbyte::cpu {
namespace {

inline constexpr int64_t kChunk = 65536;                   // elements that one thread takes at a time
inline constexpr int64_t kStreamBytes = int64_t{4} << 20;  // larger outputs bypass the caches
inline constexpr float kLargest = 3.402823466e+38f;

HALFBYTE_INLINE const float* levels_of(Format format) {
  return format == Format::nf4 ? nf4_levels : fp4_levels;
}

// absmax of blocks first .. first + count - 1, decoded into `buffer` where it is nested.
HALFBYTE_INLINE const float* absmax_range(const Absmax& a, int64_t first, int64_t count, float* buffer) {
  if (a.nested == nullptr) return static_cast<const float*>(a.values) + first;
  const uint8_t* codes = static_cast<const uint8_t*>(a.values) + first;
  const float offset = read<float>(a.offset);
  for (int64_t i = 0; i < count;) {
    const float scale = read<float>(a.nested + (first + i) / 256);
    const int64_t end = min64(count, i + 256 - (first + i) % 256);
    for (; i < end; ++i) buffer[i] = read<float>(a.codebook + codes[i]) * scale + offset;
  }
  return buffer;
}

template <class V, class T>
HALFBYTE_INLINE float block_absmax(const T* x, int64_t count) {
  typename V::F m = V::set1(0.0f), m2 = m;
  int64_t i = 0;
  for (; i + 2 * V::W <= count; i += 2 * V::W) {
    m = V::max_keep(m, V::abs(V::load(x + i)));
    m2 = V::max_keep(m2, V::abs(V::load(x + i + V::W)));
  }
  for (; i < count; i += V::W) {
    T part[V::W] = {};
    memcpy(part, x + i, static_cast<size_t>(min64(V::W, count - i)) * sizeof(T));
    m = V::max_keep(m, V::abs(V::load(part)));
  }
  return V::hmax(V::max_keep(m, m2));
}

template <class V, Format format>
HALFBYTE_INLINE typename V::I encode4(typename V::F scaled) {
  return format == Format::nf4 ? V::nf4(scaled) : V::fp4(scaled);
}

template <class V, Format format, class T>
HALFBYTE_INLINE void quantize_block4(const T* x, int64_t count, uint8_t* packed, float* absmax) {
  constexpr uint8_t code_of_zero = format == Format::nf4 ? 7 : 0;
  const float largest = block_absmax<V>(x, count);
  const float reciprocal = 1.0f / largest;
  write(absmax, largest);
  if (!(reciprocal <= kLargest)) {
    memset(packed, 0, static_cast<size_t>((count + 1) / 2));
    if (count % 2 != 0) packed[count / 2] = code_of_zero;
    return;
  }
  const typename V::F r = V::set1(reciprocal);
  int64_t i = 0;
  for (; i + V::W <= count; i += V::W) {
    V::pack_nibbles(packed + i / 2, encode4<V, format>(V::mul(V::load(x + i), r)));
  }
  if (i < count) {
    T part[V::W] = {};
    uint8_t bytes[V::W / 2];
    memcpy(part, x + i, static_cast<size_t>(count - i) * sizeof(T));
    V::pack_nibbles(bytes, encode4<V, format>(V::mul(V::load(part), r)));
    memcpy(packed + i / 2, bytes, static_cast<size_t>((count - i + 1) / 2));
  }
}

template <class V, class T>
void quantize4(const T* x, int64_t count, Format format, int64_t blocksize, uint8_t* packed, float* absmax,
               int threads) {
  const int64_t chunk = max64(kChunk, blocksize);
  parallel_for(team(threads, count, kChunk / 4), ceil_div(count, chunk), [=](int64_t c) {
    const int64_t end = min64(count, (c + 1) * chunk);
    for (int64_t i = c * chunk; i < end; i += blocksize) {
      const int64_t size = min64(blocksize, end - i);
      if (format == Format::nf4) {
        quantize_block4<V, Format::nf4>(x + i, size, packed + i / 2, absmax + i / blocksize);
      } else {
        quantize_block4<V, Format::fp4>(x + i, size, packed + i / 2, absmax + i / blocksize);
      }
    }
  });
}

template <class V>
const char* quantize_4bit(const void* x, DType dtype, int64_t count, Format format, int64_t blocksize,
                          uint8_t* packed, float* absmax, int threads) {
  expect_writes(packed, static_cast<size_t>(count / 2));
  return with_dtype(dtype, [=](auto* type) -> const char* {
    quantize4<V>(static_cast<decltype(type)>(const_cast<void*>(x)), count, format, blocksize, packed, absmax,
                 threads);
    return nullptr;
  });
}

// The sixteen products of one block, as they are stored.
template <class V, class T>
HALFBYTE_INLINE void block_table(const float* levels, float absmax, T* table) {
  for (int i = 0; i < 16; i += V::W) V::store(table + i, V::mul(V::load(levels + i), V::set1(absmax)));
}

// Elements first .. first + count - 1 of the flat weight in natural order; absmax[0] is that of first's
// block.
template <class V, bool kStream, class T>
HALFBYTE_INLINE void decode_flat(const uint8_t* packed, const float* absmax, const float* levels,
                                 int log2_blocksize, int64_t first, int64_t count, T* out) {
  const int64_t end = first + count, first_block = first >> log2_blocksize;
  alignas(64) T table[16];
  for (int64_t i = first; i < end;) {
    const int64_t block = i >> log2_blocksize, stop = min64(end, (block + 1) << log2_blocksize);
    block_table<V>(levels, read<float>(absmax + (block - first_block)), table);
    if (i % 2 != 0) {
      write(out + (i - first), table[packed[i / 2] & 15]);
      ++i;
    }
    if (const int64_t run = (stop - i) / 32 * 32; run > 0) {
      V::template decode_run<kStream>(packed + i / 2, run, table, out + (i - first));
      i += run;
    }
    for (; i < stop; ++i) write(out + (i - first), table[(packed[i / 2] >> (i % 2 != 0 ? 0 : 4)) & 15]);
  }
}

template <class V, class T>
void dequantize4(Weight4 w, T* out, int64_t count, int threads) {
  const int log2_blocksize = log2_of(w.blocksize);
  const float* levels = levels_of(w.format);
  const bool stream =
      count * static_cast<int64_t>(sizeof(T)) >= kStreamBytes && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  parallel_pieces(
      team(threads, count, kChunk / 4), out, count, kChunk, stream, [=](int64_t begin, int64_t end) {
        float buffer[kChunk / 32 + 2];
        for (int64_t first = begin; first < end; first += kChunk) {
          const int64_t size = min64(kChunk, end - first);
          const auto [block, blocks] = blocks_of(first, size, log2_blocksize);
          const float* absmax = absmax_range(w.absmax, block, blocks, buffer);
          if (stream) {
            decode_flat<V, true>(w.packed, absmax, levels, log2_blocksize, first, size, out + first);
          } else {
            decode_flat<V, false>(w.packed, absmax, levels, log2_blocksize, first, size, out + first);
          }
        }
        if (stream) V::fence();
      });
}

template <class V>
const char* dequantize_4bit(Weight4 weight, void* out, DType dtype, int64_t count, int threads) {
  return with_dtype(dtype, [=](auto* type) -> const char* {
    expect_writes(out, static_cast<size_t>(count) * sizeof(*type));
    dequantize4<V>(weight, static_cast<decltype(type)>(out), count, threads);
    return nullptr;
  });
}

}  // namespace
}  // namespace halfbyte::cpu
