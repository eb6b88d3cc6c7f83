// linear4_tile.cu: y = x . dequantize(W)^T + bias for 9 and more rows of x, sm_90a.
//
// Layout    as in linear4_stream.cu.
// Idea      The weights are wgmma's A operand, straight from the table of pairs into registers; x, as it lies, is its B
//           operand in shared memory.  A k16 step wants bytes t and 4 + t of a row's eight for lane t of a quad: the
//           four lanes read the same 16 bytes and each permutes its byte out.  absmax multiplies the float32 sum of a
//           block of 64, so a weight is never rounded after its level.
// Work      A CTA owns 64 R rows of W and BM rows of x.  R x KW warpgroups multiply: R of them share the rows, KW take
//           turns at blocks of 64 k.  One thread feeds the rings of W (256 k a stage) and x (64 k), three warps that of
//           the scales.  K may further be split over a cluster; all parts add up in the order of K, through shared memory.
// Limits    K % 256 == 0 and K % blocksize == 0, blocksize >= 64; pointers aligned to 16 bytes; M, N, K < 2^31.
// Bound by  the tensor cores, in the end; before that by the shared-memory pipe: for 1024 weights 16 wavefronts of
//           look-ups, 8 of weights, BM / 4 of x.
#include "linear4.cuh"
#include "wgmma.cuh"

namespace halfbyte::cuda {
namespace {

template <int BM, int R, int KW>
struct Tile {
  static constexpr int kRows = 64 * R, kGroups = R * KW, kThreads = (kGroups + 1) * 128;
  static constexpr int kDepth = R == 4 ? 3 : R == 2 ? 4 : 6, kXDepth = BM >= 128 ? 4 : 8;
  // Registers: what the launch gives (96 or 168 a thread), shared out anew; the sums must match or warps wait for ever.
  static constexpr int kRegisters = kGroups == 4 ? 112 : 232, kFeeders = kGroups == 4 ? 32 : 40;
  static_assert(kGroups * kRegisters + kFeeders == (kGroups + 1) * (kGroups == 4 ? 96 : 168));
  static constexpr int kWeights = kRows * 128, kScales = kRows * 16, kX = BM * 128;
  // The scales stand in the gaps of the table.
  static constexpr int kW_at = kTable, kX_at = kW_at + kDepth * kWeights, kBarriers_at = kX_at + kXDepth * kX;
  static constexpr int kCodebook_at = kDepth * kScales;  // in the gaps too
  static constexpr int kBytes = kBarriers_at + 8 * (3 * kDepth + 2 * kXDepth);
  static constexpr int kStride = kRows + 4,
                       kSums = BM * kStride;  // floats; of the sums, which reuse the rings
  static_assert(KW * kSums * 4 <= kBarriers_at - kW_at && kBytes <= 232448 && kCodebook_at + 1024 <= 32768);
};

template <int N>
__device__ __forceinline__ void pin(float (&d)[N]) {  // what the compiler must not move across a wait
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <typename T>
__device__ __forceinline__ void store4(float4 v, T* out, int valid) {
  alignas(8) T r[4];
  from_float(v.x, r), from_float(v.y, r + 1), from_float(v.z, r + 2), from_float(v.w, r + 3);
  if (valid >= 4 && !(reinterpret_cast<uintptr_t>(out) & 7)) {
    *reinterpret_cast<uint2*>(out) = *reinterpret_cast<const uint2*>(r);
  } else {
    for (int i = 0; i < 4 && i < valid; ++i) out[i] = r[i];
  }
}

template <typename T, int BM, int R, int KW, bool NESTED>
__global__ void __launch_bounds__(Tile<BM, R, KW>::kThreads, 1)
    tile(const __grid_constant__ CUtensorMap wmap, const __grid_constant__ CUtensorMap xmap,
         const __grid_constant__ Levels levels, const __grid_constant__ Scales scales,
         const T* __restrict__ bias, T* __restrict__ y, int M, int N, int K, int log_splits, int m_tiles) {
#ifdef HALFBYTE_SM90A
  using L = Tile<BM, R, KW>;
  extern __shared__ __align__(1024) uint8_t smem[];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, splits = 1 << log_splits;
  const uint32_t base = shared_address(smem);
  if ((base & 0xffffff) != kTable_at) __trap();  // above: the rank in the cluster
  const uint32_t w_full = base + L::kBarriers_at, w_empty = w_full + 8 * L::kDepth,
                 s_full = w_empty + 8 * L::kDepth;
  const uint32_t x_full = s_full + 8 * L::kDepth, x_empty = x_full + 8 * L::kXDepth;
  const int rank = blockIdx.x & (splits - 1), part_of_n = (blockIdx.x >> log_splits) / m_tiles;
  const int m0 = ((blockIdx.x >> log_splits) - part_of_n * m_tiles) * BM, row0 = part_of_n * L::kRows;
  const int64_t slices = K / 256;
  const int first = static_cast<int>(slices * rank >> log_splits);
  const int steps = static_cast<int>(slices * (rank + 1) >> log_splits) - first;

  if (tid == 0) {
    for (int i = 0; i < L::kDepth; ++i) {
      mbarrier_init(w_full + 8 * i, 1), mbarrier_init(s_full + 8 * i, 96);
      mbarrier_init(w_empty + 8 * i, 4 * L::kGroups);
    }
    for (int i = 0; i < L::kXDepth; ++i)
      mbarrier_init(x_full + 8 * i, 1), mbarrier_init(x_empty + 8 * i, 4 * R);
    mbarrier_init_done();
  }
  __syncthreads();

  if (warp >= 4 * L::kGroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(L::kFeeders));
    const int worker = tid - (4 * L::kGroups + 1) * 32;
    if (worker >= 0) {
      const uint8_t* codebook = smem + gap(L::kCodebook_at);
      static_assert(L::kCodebook_at % 128 == 0);
      float offset = 0.f;
      if (NESTED) {
        for (int i = worker; i < 256; i += 96)
          *reinterpret_cast<float*>(smem + gap(L::kCodebook_at + i * 4)) = scales.nested_codebook[i];
        offset = *scales.offset;
        asm volatile("bar.sync 1, 96;" ::: "memory");
      }
      constexpr int kEach = (L::kRows + 95) / 96;
      int stage = 0;
      uint32_t turn = 1;
      for (int i = 0; i < steps; ++i) {
        RawScales<NESTED> raw[kEach];
#pragma unroll
        for (int r = 0; r < kEach; ++r) {
          const int row = r * 96 + worker;
          if (row < L::kRows && row0 + row < N)
            raw[r].load(scales, row0 + row, (first + i) * 256);
          else
            raw[r].clear();
        }
        mbarrier_wait(w_empty + 8 * stage, turn);
#pragma unroll
        for (int r = 0; r < kEach; ++r) {
          const int row = r * 96 + worker;
          if (row < L::kRows)
            *reinterpret_cast<float4*>(smem + gap(stage * L::kScales + row * 16)) =
                raw[r].value(codebook, offset);
        }
        mbarrier_arrive(s_full + 8 * stage);
        if (++stage == L::kDepth) stage = 0, turn ^= 1;
      }
    } else if (lane == 0) {
      const uint64_t keep = evict_last(), once = m_tiles > 1 ? keep : evict_first();
      int stage = 0, x_stage = 0, ahead = 0;
      uint32_t turn = 1, x_turn = 1;
      const auto weights = [&] {
        mbarrier_wait(w_empty + 8 * stage, turn);
        mbarrier_expect(w_full + 8 * stage, L::kWeights);
        copy_box(base + L::kW_at + stage * L::kWeights, &wmap, (first + ahead) * 128, row0,
                 w_full + 8 * stage, once);
        if (++stage == L::kDepth) stage = 0, turn ^= 1;
        ++ahead;
      };
      while (ahead < L::kDepth && ahead < steps) weights();
      wait_for_previous_kernel();
      let_next_kernel_start();
      for (int j = 0; j < steps * 4; ++j) {
        mbarrier_wait(x_empty + 8 * x_stage, x_turn);
        mbarrier_expect(x_full + 8 * x_stage, L::kX);
        copy_box(base + L::kX_at + x_stage * L::kX, &xmap, first * 256 + j * 64, m0, x_full + 8 * x_stage,
                 keep);
        if (++x_stage == L::kXDepth) x_stage = 0, x_turn ^= 1;
        // The rings run at different paces: W's next stage is asked for once its place can be free.
        if ((j & 3) == 3 && ahead < steps && ahead <= (j >> 2) + L::kDepth - L::kXDepth / 4) weights();
      }
    }
    __syncwarp();
    asm volatile("bar.sync 2, %0;" ::"n"(L::kThreads) : "memory");
    if (splits > 1) cluster_sync(), cluster_leave();
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(L::kRegisters));
  fill_table(smem, levels, tid, L::kGroups * 128);
  asm volatile("bar.sync 3, %0;" ::"n"(L::kGroups * 128) : "memory");

  const int g = lane >> 2, t = lane & 3, row = (warp >> 2) % R * 64 + (warp & 3) * 16 + g,
            kw = (warp >> 2) / R;
  const uint32_t table = (base - kTable_at) | lane * 4, select = selector(t);
  float acc[BM / 2] = {};
  // The A operands of block b of a stage.
  const auto decode = [&](uint32_t (&a)[4][4], int stage, int b) {
    const uint32_t w = base + L::kW_at + stage * L::kWeights + row * 128 + (((2 * b) ^ g) << 4);
    const uint4 p0 = lds128(w), p1 = lds128(w ^ 16), q0 = lds128(w + 1024), q1 = lds128((w ^ 16) + 1024);
    const uint32_t p[8] = {p0.x, p0.y, p0.z, p0.w, p1.x, p1.y, p1.z, p1.w};
    const uint32_t q[8] = {q0.x, q0.y, q0.z, q0.w, q1.x, q1.y, q1.z, q1.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i][0] = lookup(p[2 * i], select, table), a[i][1] = lookup(q[2 * i], select, table);
      a[i][2] = lookup(p[2 * i + 1], select, table), a[i][3] = lookup(q[2 * i + 1], select, table);
    }
  };
  constexpr bool kAhead = L::kGroups == 2;  // with few warps, look up one product ahead
  uint32_t a[kAhead ? 2 : 1][4][4];
  int stage = 0;
  uint32_t parity = 0;
  const uint32_t scales_at = gap(row * 16), scales_at8 = gap((row + 8) * 16);
  // Product of block b of this stage; `then` gets the operands of the block that follows it.
  const auto product = [&](int i, int b, uint32_t (&now)[4][4], uint32_t (&then)[4][4]) {
    const int j = i * 4 + b, x_stage = j % L::kXDepth;
    const uint32_t s = base + stage * L::kScales * 2 + b * 4;
    const float s0 = __uint_as_float(lds32(s + scales_at)), s1 = __uint_as_float(lds32(s + scales_at8));
    if (!kAhead) decode(now, stage, b);
    mbarrier_wait(x_full + 8 * x_stage, (j / L::kXDepth) & 1);
    const uint64_t x =
        (1ull << 62) | (64ull << 32) | (1ull << 16) | ((base + L::kX_at + x_stage * L::kX) & 0x3ffff) >> 4;
    float part[BM / 2];
    pin(part);
    // Two warpgroups take turns at the tensor cores: while one multiplies, the other adds up.
    if (kAhead) asm volatile("bar.sync %0, 256;" ::"r"(4 + (warp >> 2)) : "memory");
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma(part, now[k], x + 2 * k, k, T());
    wgmma_commit();
    if (kAhead) asm volatile("bar.arrive %0, 256;" ::"r"(5 - (warp >> 2)) : "memory");
    if (kAhead) {
      if (b + KW < 4) {
        decode(then, stage, b + KW);
      } else if (i + 1 < steps) {
        const int next = stage + 1 == L::kDepth ? 0 : stage + 1;
        mbarrier_wait(w_full + 8 * next, next ? parity : parity ^ 1);
        decode(then, next, kw);
      }
    }
    wgmma_wait();
    pin(part);
#pragma unroll
    for (int e = 0; e < BM / 8; ++e) {
      acc[4 * e] = fmaf(part[4 * e], s0, acc[4 * e]),
              acc[4 * e + 1] = fmaf(part[4 * e + 1], s0, acc[4 * e + 1]);
      acc[4 * e + 2] = fmaf(part[4 * e + 2], s1, acc[4 * e + 2]),
                  acc[4 * e + 3] = fmaf(part[4 * e + 3], s1, acc[4 * e + 3]);
    }
    if (lane == 0) mbarrier_arrive(x_empty + 8 * x_stage);
  };
  if (kAhead && warp >> 2) asm volatile("bar.arrive 4, 256;" ::: "memory");  // the first goes first
  if (kAhead && steps) {
    mbarrier_wait(w_full, 0);
    decode(a[0], 0, kw);
  }
  for (int i = 0; i < steps; ++i) {
    mbarrier_wait(s_full + 8 * stage, parity);
    if (!kAhead) mbarrier_wait(w_full + 8 * stage, parity);
    if constexpr (kAhead) {
#pragma unroll 1
      for (int b = kw; b < 4; b += 2 * KW) {
        product(i, b, a[0], a[1]);
        product(i, b + KW, a[1], a[0]);
      }
    } else {
#pragma unroll 1
      for (int b = kw; b < 4; b += KW) product(i, b, a[0], a[0]);
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(w_empty + 8 * stage);
    if (++stage == L::kDepth) stage = 0, parity ^= 1;
  }
  // The sums to shared memory, [kw][m][row]; then all parts in the order of K.
  asm volatile("bar.sync 2, %0;" ::"n"(L::kThreads) : "memory");
  float* sums = reinterpret_cast<float*>(smem + L::kW_at);
#pragma unroll
  for (int j = 0; j < BM / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      sums[kw * L::kSums + (8 * j + 2 * t + (e & 1)) * L::kStride + row + (e >> 1) * 8] = acc[4 * j + e];
  if (splits > 1)
    cluster_sync();
  else
    asm volatile("bar.sync 3, %0;" ::"n"(L::kGroups * 128) : "memory");
  // Each CTA of the cluster finishes its share of the rows, four a thread.
  const int log_share = (R == 4 ? 6 : R == 2 ? 5 : 4) - log_splits, rows = min(BM, M - m0);
  const uint32_t from = shared_address(sums);
  for (int i = tid; i < rows << log_share; i += L::kGroups * 128) {
    const int m = i >> log_share, r = ((rank << log_share) + (i & ((1 << log_share) - 1))) * 4, n = row0 + r;
    if (n >= N) continue;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    const uint32_t at = from + (m * L::kStride + r) * 4;
    const auto add = [&](float4 v) { sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w; };
    if (splits == 1) {
#pragma unroll
      for (int q = 0; q < KW; ++q)
        add(*reinterpret_cast<const float4*>(sums + q * L::kSums + m * L::kStride + r));
    } else {
      for (int p = 0; p < splits; p += 2) {
        float4 v[2][KW];
#pragma unroll
        for (int e = 0; e < 2 * KW; ++e)
          v[e / KW][e % KW] = load_of_rank(at + e % KW * L::kSums * 4, p + e / KW);
#pragma unroll
        for (int e = 0; e < 2 * KW; ++e) add(v[e / KW][e % KW]);
      }
    }
    const int valid = N - n;
    if (bias) {
      sum.x += to_float(bias[n]);
      if (valid > 1) sum.y += to_float(bias[n + 1]);
      if (valid > 2) sum.z += to_float(bias[n + 2]);
      if (valid > 3) sum.w += to_float(bias[n + 3]);
    }
    store4(sum, y + static_cast<int64_t>(m0 + m) * N + n, valid);
  }
  if (splits > 1) cluster_leave();
#endif
}

template <typename T, int BM, int R, int KW, bool NESTED>
const char* launch_tile(const Linear4& a, int log_splits) {
  using L = Tile<BM, R, KW>;
  CUtensorMap w, x;
  const cuuint64_t w_dims[2] = {static_cast<cuuint64_t>(a.k / 2), static_cast<cuuint64_t>(a.n)};
  const cuuint64_t w_strides[1] = {static_cast<cuuint64_t>(a.k / 2)};
  const cuuint32_t w_box[2] = {128, L::kRows};
  const cuuint64_t x_dims[2] = {static_cast<cuuint64_t>(a.k), static_cast<cuuint64_t>(a.m)};
  const cuuint64_t x_strides[1] = {static_cast<cuuint64_t>(a.k * 2)};
  const cuuint32_t x_box[2] = {64, BM};
  if (!encode_tensor_map(&w, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, a.weight.packed, w_dims, w_strides, w_box,
                         CU_TENSOR_MAP_SWIZZLE_128B) ||
      !encode_tensor_map(&x, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, a.x, x_dims, x_strides, x_box,
                         CU_TENSOR_MAP_SWIZZLE_128B))
    return "linear_4bit: the driver refused a tensor map";
  constexpr auto kernel = tile<T, BM, R, KW, NESTED>;
  int device = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = allow_shared_memory<tile<T, BM, R, KW, NESTED>>(device, L::kBytes);
  if (e != cudaSuccess) return cudaGetErrorString(e);
  const int m_tiles = static_cast<int>((a.m + BM - 1) / BM),
            n_tiles = static_cast<int>((a.n + L::kRows - 1) / L::kRows);
  cudaLaunchConfig_t config = {};
  config.gridDim = n_tiles * m_tiles << log_splits, config.blockDim = L::kThreads,
  config.dynamicSmemBytes = L::kBytes;
  config.stream = static_cast<cudaStream_t>(a.stream);
  cudaLaunchAttribute attributes[2];
  overlapping(attributes, 1 << log_splits);
  config.attrs = attributes, config.numAttrs = a.overlap ? 2 : 1;
  e = cudaLaunchKernelEx(&config, kernel, w, x, levels_of<T>(a.weight.format), scales_of(a),
                         static_cast<const T*>(a.bias), static_cast<T*>(a.y), static_cast<int>(a.m),
                         static_cast<int>(a.n), static_cast<int>(a.k), log_splits, m_tiles);
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

template <int BM, int R, int KW>
const char* launch_for(const Linear4& a, int log_splits) {
  const bool nested = a.weight.absmax.nested != nullptr;
  if (a.dtype == DType::bfloat16) {
    return nested ? launch_tile<__nv_bfloat16, BM, R, KW, true>(a, log_splits)
                  : launch_tile<__nv_bfloat16, BM, R, KW, false>(a, log_splits);
  }
  return nested ? launch_tile<__half, BM, R, KW, true>(a, log_splits)
                : launch_tile<__half, BM, R, KW, false>(a, log_splits);
}

}  // namespace

const char* linear_4bit_tile(const Linear4& a, int columns, int groups, int turns, int log_splits) {
  if (log_splits >= 0 && log_splits <= 2) {
    switch (columns * 100 + groups * 10 + turns) {
      case 3241:
        return launch_for<32, 4, 1>(a, log_splits);
      case 3222:
        return launch_for<32, 2, 2>(a, log_splits);
      case 3214:
        return launch_for<32, 1, 4>(a, log_splits);
      case 6441:
        return launch_for<64, 4, 1>(a, log_splits);
      case 6422:
        return launch_for<64, 2, 2>(a, log_splits);
      case 6414:
        return launch_for<64, 1, 4>(a, log_splits);
      case 12821:
        return launch_for<128, 2, 1>(a, log_splits);
      case 12812:
        return launch_for<128, 1, 2>(a, log_splits);
    }
  }
  return "linear_4bit: no such variant of the tiled kernel";
}

}  // namespace halfbyte::cuda
