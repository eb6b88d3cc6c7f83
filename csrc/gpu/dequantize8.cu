// dequantize8.cu: codes of a 256-entry codebook and one absmax per block -> fp32, fp16, bf16.
//
// Work      a thread reads the codes of 16 bytes of output (8 bytes, for fp32 4) in kBatch places at once; a
//           warp's accesses are contiguous on both sides.  The codebook stands in shared memory once per lane, in
//           banks of its own.  Where blocks do not consist of such places, one value per thread.
// Limits    codes and out aligned to 16 bytes.
// Bound by  memory: reads 1 byte + 4 / blocksize, writes sizeof(T) per value.
// Agrees    bit for bit with the reference: product in fp32, rounded once.
#include "halfbyte/gpu.h"
#include "portable.cuh"

namespace halfbyte::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kBatch = 4;
constexpr int kCopies = 32;

template <class T>
__global__ void __launch_bounds__(kThreads)
    dequantize_8bit_kernel(const uint8_t* __restrict__ codes, const float* __restrict__ absmax,
                           const float* __restrict__ codebook, int shift, T* __restrict__ out,
                           int64_t chunks) {
  constexpr int kValues = 16 / sizeof(T);
  __shared__ float table[256 * kCopies];
  for (unsigned i = threadIdx.x; i < 256 * kCopies; i += kThreads) table[i] = codebook[i / kCopies];
  __syncthreads();
  const unsigned lane = threadIdx.x % kCopies;
  const int64_t step = int64_t{gridDim.x} * kThreads * kBatch;
  for (int64_t base = int64_t{blockIdx.x} * kThreads * kBatch + threadIdx.x; base < chunks; base += step) {
    Words<kValues> words[kBatch];
    float scale[kBatch];
    HALFBYTE_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int64_t chunk = base + b * kThreads;
      if (chunk >= chunks) break;
      words[b] = load<kValues>(codes + chunk * kValues);
      scale[b] = absmax[chunk * kValues >> shift];
    }
    HALFBYTE_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int64_t chunk = base + b * kThreads;
      if (chunk >= chunks) break;
      float v[kValues];
      HALFBYTE_UNROLL
      for (int i = 0; i < kValues; ++i) {
        v[i] = table[(words[b].w[i / 4] >> (i % 4 * 8) & 255u) * kCopies + lane] * scale[b];
      }
      store<16>(out + chunk * kValues, narrow_all<T>(v));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    dequantize_8bit_any_kernel(const uint8_t* __restrict__ codes, const float* __restrict__ absmax,
                               const float* __restrict__ codebook, int64_t blocksize, T* __restrict__ out,
                               int64_t first, int64_t count) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = first + int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) {
    out[i] = narrow<T>(codebook[codes[i]] * absmax[quotient(i, blocksize)]);
  }
}

}  // namespace

const char* dequantize_8bit(const uint8_t* codes, const float* absmax, const float* codebook,
                            int64_t blocksize, void* out, DType dtype, int64_t count, void* stream) {
  return with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kValues = 16 / sizeof(T);
    auto* to = static_cast<T*>(out);
    const int shift = log2_of(blocksize);
    const bool fast = blocksize >= kValues && int64_t{1} << shift == blocksize;
    const int64_t chunks = fast ? count / kValues : 0;
    if (chunks > 0) {
      const int each = resident(dequantize_8bit_kernel<T>, kThreads);
      const unsigned grid = grid_for(ceil_div(chunks, kThreads * kBatch), each);
      HALFBYTE_LAUNCH((dequantize_8bit_kernel<T>), grid, kThreads, 0, stream, codes, absmax, codebook, shift,
                      to, chunks);
      if (const char* error = launched()) return error;
    }
    const int64_t first = chunks * kValues;
    if (first == count) return static_cast<const char*>(nullptr);
    const unsigned grid = grid_for(ceil_div(count - first, kThreads), 8);
    HALFBYTE_LAUNCH((dequantize_8bit_any_kernel<T>), grid, kThreads, 0, stream, codes, absmax, codebook,
                    blocksize, to, first, count);
    return launched();
  });
}

}  // namespace halfbyte::gpu
