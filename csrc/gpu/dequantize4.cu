// dequantize4.cu: packed 4-bit codes and one scale per block, plain or nested -> fp32, fp16, bf16.
//
// Layout    packed[i] holds codes 2i (high nibble) and 2i + 1 (low nibble) of a matrix [.., k]; the part of it
//           that is asked for is written as a dense matrix.
// Work      a thread reads the codes of 16 bytes of output (4 bytes, for fp32 2) in kBatch places at once, so
//           that loads are in flight together; a warp's accesses are contiguous on both sides.  Where a part
//           begins between those places, one value per thread.
// Limits    out aligned to 16 bytes; blocksize a power of two >= 32, so those values share one scale.
// Bound by  memory: reads 0.5 byte + 4 / blocksize (nested 1 / blocksize), writes sizeof(T) per value.
// Agrees    bit for bit with the reference: product in fp32, rounded once; nested: product and sum each rounded.
#include "fourbit.cuh"
#include "halfbyte/gpu.h"

namespace halfbyte::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kBatch = 4;

// Where chunk i of the part stands in the matrix.  Flat: the part is one piece of memory.
template <bool Flat, int Values>
HALFBYTE_DEVICE int64_t element_of(const Part& part, int64_t i) {
  if constexpr (Flat) return part.row * part.k + part.column + i * Values;
  const int64_t per_row = part.columns / Values;
  const int64_t row = quotient(i, per_row);
  return (part.row + row) * part.k + part.column + (i - row * per_row) * Values;
}

template <class T, int Values, bool Nested, bool Flat>
__global__ void __launch_bounds__(kThreads)
    dequantize_4bit_kernel(Weight4 weight, Levels levels, int shift, Part part, T* __restrict__ out) {
  __shared__ Tables4 tables;
  fill_tables(tables, levels, weight.absmax);
  const float offset = Nested ? *weight.absmax.offset : 0.0f;
  __syncthreads();
  const int64_t chunks = part.rows * part.columns / Values;
  const int64_t step = int64_t{gridDim.x} * kThreads * kBatch;
  for (int64_t base = int64_t{blockIdx.x} * kThreads * kBatch + threadIdx.x; base < chunks; base += step) {
    uint32_t codes[kBatch];
    float scale[kBatch];
    HALFBYTE_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int64_t chunk = base + b * kThreads;
      if (chunk >= chunks) break;
      const int64_t element = element_of<Flat, Values>(part, chunk);
      if constexpr (Values == 1) {
        codes[b] = weight.packed[element >> 1] >> (element & 1 ? 0 : 4);
      } else {
        codes[b] = load<Values / 2>(weight.packed + element / 2).w[0];
      }
      scale[b] = scale_of<Nested>(tables, weight.absmax, offset, element >> shift);
    }
    HALFBYTE_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int64_t chunk = base + b * kThreads;
      if (chunk >= chunks) break;
      if constexpr (Values == 1) {
        out[chunk] = narrow<T>(level_of(tables, codes[b] & 15u) * scale[b]);
      } else {
        float v[Values];
        HALFBYTE_UNROLL
        for (int i = 0; i < Values; ++i) {
          const int at = i / 2 * 8 + (i % 2 == 0 ? 4 : 0);
          v[i] = level_of(tables, codes[b] >> at & 15u) * scale[b];
        }
        store<16>(out + chunk * Values, narrow_all<T>(v));
      }
    }
  }
}

template <class T, int Values, bool Nested>
const char* launch(const Weight4& weight, const Part& part, T* out, void* stream) {
  const int64_t tiles = ceil_div(part.rows * part.columns / Values, kThreads * kBatch);
  const int shift = log2_of(weight.blocksize);
  const Levels levels = levels_of(weight.format);
  if (part.rows == 1 || part.columns == part.k) {
    const unsigned grid =
        grid_for(tiles, resident(dequantize_4bit_kernel<T, Values, Nested, true>, kThreads));
    HALFBYTE_LAUNCH((dequantize_4bit_kernel<T, Values, Nested, true>), grid, kThreads, 0, stream, weight,
                    levels, shift, part, out);
  } else {
    const unsigned grid =
        grid_for(tiles, resident(dequantize_4bit_kernel<T, Values, Nested, false>, kThreads));
    HALFBYTE_LAUNCH((dequantize_4bit_kernel<T, Values, Nested, false>), grid, kThreads, 0, stream, weight,
                    levels, shift, part, out);
  }
  return launched();
}

}  // namespace

const char* dequantize_4bit(Weight4 weight, Part part, void* out, DType dtype, void* stream) {
  return with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kValues = 16 / sizeof(T);
    return with_nested(weight.absmax, [&](auto nested) {
      constexpr bool kNested = decltype(nested)::value;
      const int64_t first = part.row * part.k + part.column;
      const bool flat = part.rows == 1 || part.columns == part.k;
      const int64_t count = part.rows * part.columns;
      const bool whole = flat || (part.k % kValues == 0 && part.columns % kValues == 0);
      if (!whole || first % kValues != 0 || !aligned(weight.packed, kValues / 2)) {
        return launch<T, 1, kNested>(weight, part, static_cast<T*>(out), stream);
      }
      const int64_t rest = flat ? count % kValues : 0;
      if (count > rest) {
        const Part body = flat ? Part{part.k, part.row, 1, part.column, count - rest} : part;
        if (const char* error = launch<T, kValues, kNested>(weight, body, static_cast<T*>(out), stream))
          return error;
      }
      if (rest == 0) return static_cast<const char*>(nullptr);
      const Part tail = {part.k, part.row, 1, part.column + count - rest, rest};
      return launch<T, 1, kNested>(weight, tail, static_cast<T*>(out) + count - rest, stream);
    });
  });
}

}  // namespace halfbyte::gpu
