// linear4_wide.cuh: what linear4_wide.cu is made of: its tiles, decoding in registers, the way of sums to y.
#pragma once
#include <algorithm>

#include "linear4.cuh"

namespace halfbyte::cuda {

constexpr int kMostSplits = 3;       // blocks of a cluster
constexpr int kOutBytes = 32 * 128;  // of shared memory, of a warpgroup: 32 rows of y, 64 values each

// y [M, N] and how it is shared out: tiles of 128 rows of W, stages of 256 k, blocks of a cluster that share k.
struct Plan {
  int M, N, stages, m_tiles, n_tiles, splits;
};

// A tile's place.  Up to 1024 rows of x meet one part of W before the next.
struct Tile {
  int m, n;
  __device__ __forceinline__ Tile(const Plan& p, int i) {
    constexpr int kBand = 4;
    const int band = i / (kBand * p.n_tiles), rest = i - band * kBand * p.n_tiles;
    const int height = min(kBand, p.m_tiles - band * kBand);
    n = rest / height, m = band * kBand + rest - n * height;
  }
};

// A place in a ring.
template <int DEPTH>
struct Turn {
  int at = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++at == DEPTH) at = 0, parity ^= 1;
  }
};

// -- decoding --------------------------------------------------------------------------------------------------

struct ExactLevels {
  float of[16];
};
inline ExactLevels exact_levels(Format format) {
  ExactLevels levels;
  std::memcpy(levels.of, format == Format::fp4 ? fp4_levels : nf4_levels, sizeof levels.of);
  return levels;
}

__device__ __forceinline__ uint32_t permute(uint32_t lo, uint32_t hi, uint32_t selector) {
  uint32_t v;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(lo), "r"(hi), "r"(selector));
  return v;
}

// The 16 weights of a block, rounded to T: their high and their low bytes.  A byte permutation then looks up four.
struct Table {
  uint4 high, low;
};
template <typename T>
__device__ __forceinline__ Table table_of(const ExactLevels& levels, float scale) {
  uint32_t p[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) p[i] = pack(levels.of[2 * i] * scale, levels.of[2 * i + 1] * scale, T());
  const auto bytes = [&](uint32_t selector) {
    return make_uint4(permute(p[0], p[1], selector), permute(p[2], p[3], selector),
                      permute(p[4], p[5], selector), permute(p[6], p[7], selector));
  };
  return {bytes(0x7531), bytes(0x6420)};
}

// The weights of four codes, the lower two bytes of `codes`, in order; N times side by side, as each is a long chain.
template <int N>
__device__ __forceinline__ void decode(const uint32_t (&codes)[N], const Table& table, uint32_t (&first)[N],
                                       uint32_t (&second)[N]) {
  uint32_t upper[N], i[N], high[N], low[N];
#pragma unroll
  for (int n = 0; n < N; ++n) i[n] = codes[n] & 0x7777;
#pragma unroll
  for (int n = 0; n < N; ++n)
    upper[n] = permute(codes[n], codes[n] << 4, 0x9d8c);  // 0xff where a code is 8 or more
  const auto look_up = [&](const uint4& t, uint32_t (&found)[N]) {
    uint32_t more[N];
#pragma unroll
    for (int n = 0; n < N; ++n) found[n] = permute(t.x, t.y, i[n]);
#pragma unroll
    for (int n = 0; n < N; ++n) more[n] = permute(t.z, t.w, i[n]);
#pragma unroll
    for (int n = 0; n < N; ++n) found[n] = (found[n] & ~upper[n]) | (more[n] & upper[n]);
  };
  look_up(table.high, high), look_up(table.low, low);
#pragma unroll
  for (int n = 0; n < N; ++n) first[n] = permute(low[n], high[n], 0x4051);  // the high nibble comes first
#pragma unroll
  for (int n = 0; n < N; ++n) second[n] = permute(low[n], high[n], 0x6273);
}

// -- sums to y -------------------------------------------------------------------------------------------------

// Where the sums of a warpgroup go: rows m0 .. of y, its columns n0 ..; out: its shared memory.
template <typename T>
struct Target {
  T* y;
  const T* bias;
  int m0, n0;
  uint32_t out;
};

// Part `chunk` of a warpgroup's sums: 32 rows of y, 64 columns.
template <typename T>
__device__ __forceinline__ void store_chunk(const float (&part)[16], int chunk, const Target<T>& to,
                                            const Plan& plan) {
  const int lane = threadIdx.x & 31, w4 = (threadIdx.x >> 5) & 3, bar = 1 + (threadIdx.x >> 7);
  const int m0 = to.m0 + chunk * 32, n = to.n0 + w4 * 16 + (lane >> 2);
  const float b0 = to.bias && n < plan.N ? to_float(to.bias[n]) : 0.f;
  const float b1 = to.bias && n + 8 < plan.N ? to_float(to.bias[n + 8]) : 0.f;
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    uint32_t v[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float *p = part + (j + e / 2) * 4 + e % 2 * 2, b = e % 2 ? b1 : b0;
      v[e] = pack(p[0] + b, p[1] + b, T());
    }
    store_transposed(to.out + (j * 8 + (lane >> 4) * 8 + (lane & 7)) * 128 +
                         (((w4 * 2 + (lane >> 3 & 1)) ^ (lane & 7)) << 4),
                     v);
  }
  asm volatile("bar.sync %0, 128;" ::"r"(bar) : "memory");
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = (threadIdx.x & 127) + 128 * r, m = at >> 3, piece = at & 7,
              valid = plan.N - to.n0 - piece * 8;
    const uint4 v = lds128(to.out + m * 128 + ((piece ^ (m & 7)) << 4));
    if (m0 + m >= plan.M || valid <= 0) continue;
    T* y = to.y + static_cast<int64_t>(m0 + m) * plan.N + to.n0 + piece * 8;
    if (valid >= 8 && !(plan.N & 7)) {
      *reinterpret_cast<uint4*>(y) = v;
    } else {
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (e < valid)
          reinterpret_cast<uint16_t*>(y)[e] = static_cast<uint16_t>(words[e / 2] >> (e % 2 * 16));
    }
  }
  asm volatile("bar.sync %0, 128;" ::"r"(bar) : "memory");
}

template <typename T, int BM>
__device__ __forceinline__ void store_sums(float (&acc)[BM / 2], const Target<T>& to, const Plan& plan) {
#pragma unroll
  for (int c = 0; c < BM / 32; ++c)
    store_chunk(reinterpret_cast<const float (&)[16]>(acc[c * 16]), c, to, plan);
}

// The same of all parts of K, added up in its order: each block of the cluster finishes its share of the chunks.
// rings: shared memory that all warpgroups are done with, 2 BM bytes a thread.
template <typename T, int BM>
__device__ __forceinline__ void store_sums_of_cluster(float (&acc)[BM / 2], uint32_t rings, int split,
                                                      const Target<T>& to, const Plan& plan) {
  constexpr int kChunks = BM / 32;
  asm volatile("bar.sync 3, 256;" ::: "memory");
  const uint32_t mine = rings + threadIdx.x * 16;
#pragma unroll
  for (int q = 0; q < kChunks * 4; ++q) {
    const float* p = acc + q * 4;
    sts128(mine + q * 4096, __float_as_uint(p[0]), __float_as_uint(p[1]), __float_as_uint(p[2]),
           __float_as_uint(p[3]));
  }
  cluster_sync();
#pragma unroll 1
  for (int c = kChunks * split / plan.splits; c < kChunks * (split + 1) / plan.splits; ++c) {
    float4 v[kMostSplits][4];
#pragma unroll
    for (int p = 0; p < kMostSplits; ++p)
#pragma unroll
      for (int q = 0; q < 4; ++q)
        if (p < plan.splits) v[p][q] = load_of_rank(mine + (c * 4 + q) * 4096, p);
    float part[16] = {};
#pragma unroll
    for (int p = 0; p < kMostSplits; ++p)
#pragma unroll
      for (int q = 0; q < 4; ++q)
        if (p < plan.splits)
          part[4 * q] += v[p][q].x, part[4 * q + 1] += v[p][q].y, part[4 * q + 2] += v[p][q].z,
              part[4 * q + 3] += v[p][q].w;
    store_chunk(part, c, to, plan);
  }
}

// -- host ------------------------------------------------------------------------------------------------------

inline Plan plan_of(const Linear4& a, int columns, int splits) {
  Plan plan = {};
  plan.M = static_cast<int>(a.m), plan.N = static_cast<int>(a.n), plan.stages = static_cast<int>(a.k / 256);
  plan.m_tiles = static_cast<int>((a.m + columns - 1) / columns);
  plan.n_tiles = static_cast<int>((a.n + 127) / 128);
  plan.splits = std::min(splits, plan.stages);
  return plan;
}

// Blocks take tile after tile; but those that share k end after one.
template <auto Kernel, class... Arguments>
const char* launch_tiles(const Linear4& a, const Plan& plan, int threads, int bytes,
                         const Arguments&... arguments) {
  int device = 0, room = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&room, cudaDevAttrMultiProcessorCount, device);
  if (e == cudaSuccess) e = allow_shared_memory<Kernel>(device, bytes);
  if (e != cudaSuccess) return cudaGetErrorString(e);
  const int tiles = plan.m_tiles * plan.n_tiles;
  cudaLaunchConfig_t config = {};
  config.gridDim = plan.splits > 1 ? tiles * plan.splits : std::min(tiles, room);
  config.blockDim = threads, config.dynamicSmemBytes = bytes,
  config.stream = static_cast<cudaStream_t>(a.stream);
  cudaLaunchAttribute attributes[2];
  overlapping(attributes, plan.splits);
  config.attrs = attributes, config.numAttrs = a.overlap ? 2 : 1;
  e = cudaLaunchKernelEx(&config, Kernel, arguments...);
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

}  // namespace halfbyte::cuda
