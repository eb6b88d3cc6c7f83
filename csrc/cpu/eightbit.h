// eightbit.h: fp32, fp16, bf16 -> 8-bit codes of any ascending codebook with one absmax per block, and back.
//
// Encoding  code = how many of 255 thresholds the scaled value exceeds.  Threshold j is the midpoint of
//           levels j and j + 1; a tie goes to the even code, so for odd j it is the float just below it.
//           Floats are mapped to ordered 32-bit integers; their top half finds an entry
//             bits 16..23  thresholds below this bucket
//             bits 0..15   low half of the bucket's threshold, 0xffff where it has none
//           so one gather and one comparison decide.  A codebook with two thresholds in one bucket (1 / 128
//           of a power of two) takes a binary search instead.
// Bound by  the gather; decoding by memory.
// Agrees    bit for bit with the reference.
#pragma once
#include "fourbit.h"

namespace halfbyte::cpu {
namespace {

HALFBYTE_INLINE uint32_t ordered_bits(float f) {
  const uint32_t bits = as_bits(f);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

// Thresholds as ordered integers, ascending.
inline void thresholds8(const float* codebook, uint32_t* t) {
  float previous = 0.0f;
  for (int j = 0; j < 255; ++j) {
    const float middle = (read<float>(codebook + j) + read<float>(codebook + j + 1)) * 0.5f;
    const bool repeated = j > 0 && middle == previous;
    previous = middle;
    // +0.0 for either zero; a repeated midpoint never decides a tie.
    t[j] = ordered_bits(middle == 0.0f ? 0.0f : middle);
    if (j % 2 != 0 && !repeated)
      t[j] -= middle == 0.0f ? 2 : 1;  // below +0.0 stands -0.0, which ties as well
  }
}

// Fills the 65,536 entries; false where a bucket would need two thresholds.
inline bool table8(const uint32_t* t, uint32_t* table) {
  int64_t key = 0;
  for (int j = 0; j < 255; ++j) {
    const int64_t bucket = t[j] >> 16;
    if (bucket < key) return false;
    for (; key < bucket; ++key) table[key] = static_cast<uint32_t>(j) << 16 | 0xffffu;
    table[key++] = static_cast<uint32_t>(j) << 16 | (t[j] & 0xffffu);
  }
  for (; key < 65536; ++key) table[key] = 255u << 16 | 0xffffu;
  // NaN of either sign is code 0.  No scaled value is infinite, so the buckets of infinity are free.
  for (key = 0xff80; key < 65536; ++key) table[key] = 0xffffu;
  for (key = 0; key < 0x80; ++key) table[key] = 0xffffu;
  return true;
}

inline uint8_t search8(float s, const uint32_t* t) {
  if (s != s) return 0;
  const uint32_t u = ordered_bits(s);
  int index = 0;
  for (int step = 128; step > 0; step /= 2) {
    if (u > t[index + step - 1]) index += step;
  }
  return static_cast<uint8_t>(index);
}

// How a codebook is encoded: by `table` where there is one, by a search of the thresholds otherwise.
struct Encoder8 {
  const uint32_t* table;
  uint32_t thresholds[255];
};

// The encoder for `count` values; an error text where memory is short.  A thread keeps its last table per slot,
// as filling one costs as much as searching some thousand values.
inline const char* encoder8(Slot slot, const float* codebook, int64_t count, Encoder8* e) {
  struct Kept {
    uint32_t state;  // 0: nothing yet, 1: usable, 2: two thresholds in one bucket
    float codebook[256];
    uint32_t table[65536];
  };
  thresholds8(codebook, e->thresholds);
  e->table = nullptr;
  if (count < 8192) return nullptr;
  Kept* kept = static_cast<Kept*>(scratch(slot, sizeof(Kept)));
  if (kept == nullptr) return no_memory;
  if (kept->state == 0 || memcmp(kept->codebook, codebook, sizeof kept->codebook) != 0) {
    memcpy(kept->codebook, codebook, sizeof kept->codebook);
    kept->state = table8(e->thresholds, kept->table) ? 1 : 2;
  }
  if (kept->state == 1) e->table = kept->table;
  return nullptr;
}

// Codes of W scaled values.
template <class V>
HALFBYTE_INLINE typename V::I encode(const Encoder8& e, typename V::F scaled) {
  if (e.table != nullptr) return V::encode8(scaled, e.table);
  float lanes[V::W];
  uint8_t codes[V::W];
  V::store(lanes, scaled);
  for (int j = 0; j < V::W; ++j) codes[j] = search8(lanes[j], e.thresholds);
  return V::load_bytes(codes);
}

template <class V, class T>
HALFBYTE_INLINE void quantize_block8(const T* x, int64_t count, const Encoder8& encoder, uint8_t* codes,
                                     float* absmax) {
  const float largest = block_absmax<V>(x, count);
  const float reciprocal = 1.0f / largest;
  write(absmax, largest);
  if (!(reciprocal <= kLargest)) {
    memset(codes, 0, static_cast<size_t>(count));
    return;
  }
  const typename V::F r = V::set1(reciprocal);
  for (int64_t i = 0; i < count; i += V::W) {
    const int64_t size = min64(V::W, count - i);
    T part[V::W] = {};
    uint8_t bytes[V::W];
    const bool whole = size == V::W;
    if (!whole) memcpy(part, x + i, static_cast<size_t>(size) * sizeof(T));
    V::store_bytes(whole ? codes + i : bytes, encode<V>(encoder, V::mul(V::load(whole ? x + i : part), r)));
    if (!whole) memcpy(codes + i, bytes, static_cast<size_t>(size));
  }
}

template <class V>
const char* quantize_8bit(const void* x, DType dtype, int64_t count, const float* codebook, int64_t blocksize,
                          uint8_t* codes, float* absmax, int threads) {
  Encoder8 encoder;
  if (const char* error = encoder8(slot_codes, codebook, count, &encoder)) return error;
  expect_writes(codes, static_cast<size_t>(count));
  return with_dtype(dtype, [=, &encoder](auto* type) -> const char* {
    const auto* values = static_cast<decltype(type)>(const_cast<void*>(x));
    const int64_t chunk = max64(1, kChunk / blocksize) * blocksize;
    parallel_for(team(threads, count, kChunk / 8), ceil_div(count, chunk), [=, &encoder](int64_t c) {
      const int64_t end = min64(count, (c + 1) * chunk);
      for (int64_t i = c * chunk; i < end; i += blocksize) {
        quantize_block8<V>(values + i, min64(blocksize, end - i), encoder, codes + i, absmax + i / blocksize);
      }
    });
    return nullptr;
  });
}

// `count` levels * scale.
template <class V, bool kStream, class T>
HALFBYTE_INLINE void decode8(const typename V::Book& book, const uint8_t* codes, float scale, int64_t count,
                             T* out) {
  const typename V::F a = V::set1(scale);
  typename V::F first, second;
  int64_t i = 0;
  for (; i + 2 * V::W <= count; i += 2 * V::W) {
    V::lookup(book, codes + i, &first, &second);
    if (kStream) {
      V::stream(out + i, V::mul(first, a));
      V::stream(out + i + V::W, V::mul(second, a));
    } else {
      V::store(out + i, V::mul(first, a));
      V::store(out + i + V::W, V::mul(second, a));
    }
  }
  if (i < count) {
    uint8_t part[2 * V::W] = {};
    T values[2 * V::W];
    memcpy(part, codes + i, static_cast<size_t>(count - i));
    V::lookup(book, part, &first, &second);
    V::store(values, V::mul(first, a));
    V::store(values + V::W, V::mul(second, a));
    memcpy(out + i, values, static_cast<size_t>(count - i) * sizeof(T));
  }
}

template <class V, bool kStream, class T>
HALFBYTE_INLINE void dequantize_chunk8(const typename V::Book& book, const uint8_t* codes,
                                       const float* absmax, int64_t blocksize, int64_t first, int64_t end,
                                       T* out) {
  for (int64_t i = first; i < end;) {
    const int64_t stop = min64(end, (i / blocksize + 1) * blocksize);
    decode8<V, kStream>(book, codes + i, read<float>(absmax + i / blocksize), stop - i, out + i);
    i = stop;
  }
}

template <class V>
const char* dequantize_8bit(const uint8_t* codes, const float* absmax, const float* codebook,
                            int64_t blocksize, void* out, DType dtype, int64_t count, int threads) {
  return with_dtype(dtype, [=](auto* type) -> const char* {
    auto* values = static_cast<decltype(type)>(out);
    expect_writes(out, static_cast<size_t>(count) * sizeof(*values));
    const bool stream = count * static_cast<int64_t>(sizeof(*values)) >= kStreamBytes &&
                        blocksize % (2 * V::W) == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
    parallel_pieces(team(threads, count, kChunk / 8), values, count, kChunk, stream,
                    [=](int64_t first, int64_t end) {
                      const typename V::Book book = V::book(codebook);
                      if (stream) {
                        dequantize_chunk8<V, true>(book, codes, absmax, blocksize, first, end, values);
                        V::fence();
                      } else {
                        dequantize_chunk8<V, false>(book, codes, absmax, blocksize, first, end, values);
                      }
                    });
    return nullptr;
  });
}

}  // namespace
}  // namespace halfbyte::cpu
