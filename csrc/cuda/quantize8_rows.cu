// quantize8_rows.cu: rows of x to int8 for the products of linear8_few.cu and linear8_tile.cu, sm_90a.
//
// Out       q int8 [m, k] with zeros where |x| >= threshold; the largest other magnitude of each row; per block of this
//           kernel the columns in which it met outliers.  Nothing has to be cleared before.
// Work      up to kMostBlocks8 blocks; a row is in the registers of k / 16 or k / 32 threads, who meet at a barrier of
//           their own, the next row under way.
// Limits    k % 16 == 0 and k <= 32768; pointers aligned to 16 bytes.
// Bound by  memory: reads 2 and writes 1 byte per value; with few rows by latency.
// Agrees    bit for bit with ops/int8.py but for whole columns, which it does not clear.
#include <algorithm>

#include "../gpu/rows8.cuh"
#include "halfbyte/gemm8.h"
#include "hopper.cuh"

namespace halfbyte::cuda {
namespace {

using namespace halfbyte::gpu;

constexpr int kMostThreads = 1024;
constexpr int64_t kMostCollected = 128 << 20, kLeastRoom = 256;  // bytes, columns

// The largest magnitude below the threshold.  What must become 0 is 0 afterwards: outliers, which are noted in `found`, a
// byte for each vector, and what is not finite.
template <class T, int kVectors>
__device__ float ordinary(Words<16> (&raw)[kVectors], float threshold, uint32_t& found) {
  float most = 0.f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    float v[8];
    widen_all<T>(raw[i], v);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float size = fabsf(v[j]);
      const bool out = threshold > 0.f && size >= threshold;
      if (out) found |= 1u << (8 * i + j);
      if (!out) most = fmaxf(most, size);
      if (out || !(size < INFINITY)) raw[i].w[j / 2] &= j % 2 ? 0xffffu : 0xffff0000u;
    }
  }
  return most;
}

template <class T, int kVectors>
__global__ void __launch_bounds__(kMostThreads, 1)
    quantize_rows_kernel(const T* __restrict__ x, int m, int k, int lanes, float threshold, Rows8 to) {
#ifdef HALFBYTE_SM90A
  __shared__ float most_of_warp[2][kMostThreads / 32];
  __shared__ uint32_t masks[kMostThreads];
  __shared__ int named[1 + kNamed];  // the count, then columns in any order
  const int group = static_cast<int>(threadIdx.x) / lanes, thread = static_cast<int>(threadIdx.x) % lanes;
  const int groups = static_cast<int>(blockDim.x) / lanes, step = static_cast<int>(gridDim.x) * groups;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const auto read = [&](Words<16>(&raw)[kVectors], int row) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = (i * lanes + thread) * 8;
      raw[i] = row < m && at < k ? load<16>(x + static_cast<int64_t>(row) * k + at) : Words<16>{};
    }
  };
  constexpr bool kAhead = kVectors == 2;  // there are registers for the next row, too
  uint32_t found = 0;                     // a byte for each vector
  const float limit = threshold > 0.f ? threshold : INFINITY;
  int row = static_cast<int>(blockIdx.x) * groups + group;
  Words<16> raw[kVectors], next[kVectors];
  if (kAhead) read(next, row);
  for (int turn = 0; row < m; row += step, turn ^= 1) {
    if constexpr (kAhead) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) raw[i] = next[i];
      read(next, row + step);
    } else {
      read(raw, row);
    }
    uint32_t pairs = 0;  // the largest magnitudes, which are ordered as integers are
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) pairs = __vmaxu2(pairs, raw[i].w[j] & 0x7fff7fffu);
    float most = widen(T{static_cast<uint16_t>(max(pairs >> 16, pairs & 0xffffu))});
    if (!(most < limit)) most = ordinary<T, kVectors>(raw, threshold, found);
    for (int mask = 16; mask > 0; mask /= 2) most = fmaxf(most, HALFBYTE_SHFL_XOR(most, mask));
    if (thread % 32 == 0) most_of_warp[turn][threadIdx.x / 32] = most;
    asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "r"(lanes) : "memory");
    for (int i = 0; i < lanes / 32; ++i) most = fmaxf(most, most_of_warp[turn][group * (lanes / 32) + i]);
    if (thread == 0) to.absmax[row] = most;
    const float scale = row_scale(most);
    const auto write = [&](const auto& code) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int at = (i * lanes + thread) * 8;
        if (at >= k) break;
        float v[8];
        widen_all<T>(raw[i], v);
        Words<8> words;
#pragma unroll
        for (int j = 0; j < 8; j += 4)
          words.w[j / 4] = last_bytes(code(v[j] * scale), code(v[j + 1] * scale), code(v[j + 2] * scale),
                                      code(v[j + 3] * scale));
        store<8>(to.q + static_cast<int64_t>(row) * k + at, words);
      }
    };
    if (scale < INFINITY) {  // then no product is larger than 127
      write([](float v) { return narrow_byte(v); });
    } else {
      write([](float v) { return code_of(v); });
    }
  }
  if (to.named == nullptr) return;
  masks[threadIdx.x] = found;
  if (threadIdx.x <= kNamed) named[threadIdx.x] = 0;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < to.pitch; i += static_cast<int>(blockDim.x)) {
    const int vector = i / lanes, of = i - vector * lanes;
    uint32_t all = 0;
    for (int g = 0; g < groups; ++g) all |= masks[g * lanes + of];
    all = all >> 8 * vector & 255u;
    to.masks[static_cast<int64_t>(blockIdx.x) * to.pitch + i] = static_cast<uint8_t>(all);
    for (; all != 0; all &= all - 1) {
      const int at = atomicAdd(named, 1);
      if (at < kNamed) named[1 + at] = i * 8 + __ffs(static_cast<int>(all)) - 1;
    }
  }
  __syncthreads();
  if (threadIdx.x <= kNamed)
    to.named[blockIdx.x * (1 + kNamed) + threadIdx.x] = static_cast<uint16_t>(named[threadIdx.x]);
#endif
}

struct Shape {
  int vectors, lanes, groups, blocks;
};
Shape shape_of(int64_t m, int64_t k) {
  const int vectors = k <= kMostThreads * 16 ? 2 : 4;
  const int lanes = static_cast<int>((k + 256 * vectors - 1) / (256 * vectors) * 32);
  int groups = 1;
  while (groups < 8 && (groups + 1) * lanes <= kMostThreads &&
         m > static_cast<int64_t>(kMostBlocks8) * groups)
    ++groups;
  const int64_t blocks = (m + groups - 1) / groups;
  return {vectors, lanes, groups, static_cast<int>(blocks < kMostBlocks8 ? blocks : kMostBlocks8)};
}

// Where the parts of a workspace begin, and its size.
struct Places {
  int64_t absmax, named, masks, list, count, x, weight, size;
  int room;
};
Places places_of(int64_t m, int64_t n, int64_t k, bool threshold) {
  const auto up = [](int64_t bytes) { return (bytes + 127) / 128 * 128; };
  const int64_t blocks = shape_of(m, k).blocks, pitch = (k + 127) / 128 * 16;
  // All columns, where the weight's part stays within 128 MiB.
  const int64_t most = std::max<int64_t>(kLeastRoom, (kMostCollected / 2 / n) / 64 * 64);
  const int64_t room = threshold && m > kFewRows8 ? std::min((k + 63) / 64 * 64, most) : 0;
  Places at = {};
  at.absmax = up(m * k);
  at.named = up(at.absmax + 4 * m);
  at.masks = up(at.named + blocks * 2 * (1 + kNamed));
  at.list = up(at.masks + blocks * pitch);
  at.count = at.list + pitch * 32;
  at.x = up(at.count + 4);
  at.weight = up(at.x + 2 * m * room);
  at.size = at.weight + 2 * n * room;
  at.room = static_cast<int>(room);
  return at;
}

}  // namespace

int64_t linear_int8_tensor_workspace(int64_t m, int64_t n, int64_t k, float threshold) {
  return places_of(m, n, k, threshold > 0.f).size;
}

Rows8 rows_of(const Linear8& a) {
  const bool outliers = a.threshold > 0.f;
  const Places at = places_of(a.m, a.n, a.k, outliers);
  auto* data = static_cast<uint8_t*>(a.workspace);
  return {reinterpret_cast<int8_t*>(data),
          reinterpret_cast<float*>(data + at.absmax),
          outliers ? reinterpret_cast<uint16_t*>(data + at.named) : nullptr,
          data + at.masks,
          reinterpret_cast<int32_t*>(data + at.list),
          reinterpret_cast<int32_t*>(data + at.count),
          at.room ? data + at.x : nullptr,
          data + at.weight,
          shape_of(a.m, a.k).blocks,
          static_cast<int>((a.k + 127) / 128 * 16),
          at.room};
}

const char* quantize_rows(const Linear8& a, const Rows8& rows) {
  const Shape shape = shape_of(a.m, a.k);
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.blocks, config.blockDim = shape.lanes * shape.groups;
  config.stream = static_cast<cudaStream_t>(a.stream);
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap, config.numAttrs = 1;
  const auto launch = [&](auto type) {
    using T = decltype(type);
    const auto kernel = shape.vectors == 2 ? quantize_rows_kernel<T, 2> : quantize_rows_kernel<T, 4>;
    return cudaLaunchKernelEx(&config, kernel, static_cast<const T*>(a.x), static_cast<int>(a.m),
                              static_cast<int>(a.k), shape.lanes, a.threshold, rows);
  };
  const cudaError_t e = a.dtype == DType::bfloat16 ? launch(BFloat{}) : launch(Half{});
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

}  // namespace halfbyte::cuda
