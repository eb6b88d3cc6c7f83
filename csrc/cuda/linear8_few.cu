// linear8_few.cu: LLM.int8()'s layer for few rows of x, sm_90a, and which kernel serves which size.
//
// In        as in linear8_tile.cu.
// Work      128 rows of the weight are wgmma's rows, BM rows of x its columns.  Two warpgroups have 64 rows each; one thread
//           feeds their ring, 128 of k a stage, and starts with the weight before the rows of x are quantized.  Blocks of
//           a cluster share k, and the outlier columns in their part of it: three warps gather the first 32, those who
//           multiply the others.  All parts add up in the order of k, through shared memory.
// Limits    those of gemm8.h.
// Bound by  memory: one byte per weight.
// Agrees    within the op's tolerance: a block's integer sums are exact, the sum of blocks is in float32, rounded once.
#include "outliers.cuh"
#include "wgmma8.cuh"

namespace halfbyte::cuda {
namespace {

template <int BM>
struct Few {
  static constexpr int kRows = 128, kThreads = 384;
  static constexpr int kDepth =
      BM >= 64 ? 5 : 6;  // more weights under way would delay what outliers wait for
  static constexpr int kW = kRows * 128, kQ = BM * 128;
  static constexpr int kQ_at = kDepth * kW, kWeight_at = kQ_at + kDepth * kQ, kX_at = kWeight_at + kRows * 64;
  static constexpr int kScales_at = kX_at + BM * 64, kMask_at = kScales_at + BM * 4;
  static constexpr int kBarriers_at = kMask_at + kMostK8 / 8;
  static constexpr int kBytes = kBarriers_at + 8 * (2 * kDepth + 1) + static_cast<int>(sizeof(Found));
  static constexpr int kStride = kRows + 4;  // of the sums, which reuse the ring
  static_assert(kBytes <= 232448 && BM * kStride * 4 <= kWeight_at);
};

template <class T, int BM>
__global__ void __launch_bounds__(384, 1)
    few8(const __grid_constant__ CUtensorMap wmap, const __grid_constant__ CUtensorMap qmap,
         const __grid_constant__ Layer8<T> a, int log_splits, int m_tiles) {
#ifdef HALFBYTE_SM90A
  using L = Few<BM>;
  extern __shared__ __align__(1024) uint8_t smem[];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, splits = 1 << log_splits;
  const uint32_t base = shared_address(smem);
  const uint32_t full = base + L::kBarriers_at, empty = full + 8 * L::kDepth, made = empty + 8 * L::kDepth;
  Found* found = reinterpret_cast<Found*>(smem + L::kBarriers_at + 8 * (2 * L::kDepth + 1));
  float* row_scales = reinterpret_cast<float*>(smem + L::kScales_at);
  const int rank = blockIdx.x & (splits - 1), tile = blockIdx.x >> log_splits;
  const int m0 = tile % m_tiles * BM, n0 = tile / m_tiles * L::kRows;
  const int slices = (a.k + 127) / 128, first = slices * rank >> log_splits;
  const int steps = (slices * (rank + 1) >> log_splits) - first;

  if (tid == 0) {
    for (int i = 0; i < L::kDepth; ++i) mbarrier_init(full + 8 * i, 1), mbarrier_init(empty + 8 * i, 8);
    mbarrier_init(made, kFeeders);
    mbarrier_init_done();
  }
  __syncthreads();

  if (warp >= 8) {
    const int worker = tid - 9 * 32;
    if (worker >= 0) {
      wait_for_previous_kernel();
      for (int i = worker; i < BM; i += kFeeders)
        row_scales[i] = m0 + i < a.m ? a.rows.absmax[m0 + i] * kPer127 : 0.f;
      if (a.rows.named) {
        list_outliers(a.rows, first, steps, reinterpret_cast<uint32_t*>(smem + L::kMask_at), found, worker);
        const int some = min(found->count, kGathered);
        if (some > 0) {
          gather_weight<T, L::kRows, kFeeders>(smem + L::kWeight_at, a, n0, found->columns, some, worker);
          gather_x<T, BM, kFeeders>(smem + L::kX_at, a, m0, found->columns, some, worker);
          show_to_wgmma();
        }
      } else if (worker == 0) {
        found->count = 0;
      }
      mbarrier_arrive(made);
    } else if (lane == 0) {
      const uint64_t keep = evict_last(), once = m_tiles > 1 ? keep : evict_first();
      const int ahead = min(L::kDepth, steps);
      for (int i = 0; i < ahead; ++i) {
        mbarrier_expect(full + 8 * i, L::kW + L::kQ);
        copy_box(base + i * L::kW, &wmap, (first + i) * 128, n0, full + 8 * i, once);
      }
      wait_for_previous_kernel();
      let_next_kernel_start();
      for (int i = 0; i < ahead; ++i)
        copy_box(base + L::kQ_at + i * L::kQ, &qmap, (first + i) * 128, m0, full + 8 * i, keep);
      int stage = 0;
      uint32_t turn = 0;
      for (int i = ahead; i < steps; ++i) {
        mbarrier_wait(empty + 8 * stage, turn);
        mbarrier_expect(full + 8 * stage, L::kW + L::kQ);
        copy_box(base + stage * L::kW, &wmap, (first + i) * 128, n0, full + 8 * stage, once);
        copy_box(base + L::kQ_at + stage * L::kQ, &qmap, (first + i) * 128, m0, full + 8 * stage, keep);
        if (++stage == L::kDepth) stage = 0, turn ^= 1;
      }
    }
    __syncwarp();
    if (splits > 1) cluster_sync(), cluster_leave();
    return;
  }
  // What this thread finishes: four rows of the weight, whose scales are fetched while there is time.
  constexpr int kAtOnce = BM == 16 ? 1 : 2, kRanks = 4;
  const int log_share = 5 - log_splits, r = ((rank << log_share) + (tid & ((1 << log_share) - 1))) * 4,
            n = n0 + r;
  float scale[4], bias[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    scale[e] = a.weight_absmax[min(n + e, a.n - 1)] * kPer127;
    bias[e] = a.bias ? to_float(a.bias[min(n + e, a.n - 1)]) : 0.f;
  }
  const int half = warp >> 2, g = lane >> 2, t = lane & 3, row = half * 64 + (warp & 3) * 16 + g;
  int sum[BM / 2];
  int stage = 0, before = 0;
  uint32_t parity = 0;
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    mbarrier_wait(full + 8 * stage, parity);
    const uint64_t w = swizzled_rows(base + stage * L::kW + half * 64 * 128),
                   q = swizzled_rows(base + L::kQ_at + stage * L::kQ);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma(sum, w + 2 * k, q + 2 * k, i | k);
    wgmma_commit();
    wgmma_wait<1>();
    if (i > 0 && lane == 0) mbarrier_arrive(empty + 8 * before);
    before = stage;
    if (++stage == L::kDepth) stage = 0, parity ^= 1;
  }
  wgmma_wait();
  pin(sum);

  mbarrier_wait(made, 0);
#pragma unroll
  for (int j = 0; j < BM / 8; ++j) {
    const float2 scale = *reinterpret_cast<const float2*>(row_scales + 8 * j + 2 * t);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      sum[4 * j + e] = __float_as_int(static_cast<float>(sum[4 * j + e]) * (e & 1 ? scale.y : scale.x));
  }
  const int listed = found->count;
  for (int start = 0; start < listed; start += kGathered) {
    const int some = min(listed - start, kGathered);
    if (start > 0) {
      asm volatile("bar.sync 2, 256;" ::: "memory");
      if (tid < some) found->columns[tid] = __ldcg(a.rows.list + first * 128 + start + tid);
      asm volatile("bar.sync 2, 256;" ::: "memory");
      gather_weight<T, L::kRows, 256>(smem + L::kWeight_at, a, n0, found->columns, some, tid);
      gather_x<T, BM, 256>(smem + L::kX_at, a, m0, found->columns, some, tid);
      show_to_wgmma();
      asm volatile("bar.sync 2, 256;" ::: "memory");
    }
    const uint64_t w = rows_of_64(base + L::kWeight_at + half * 64 * 64), x = rows_of_64(base + L::kX_at);
    wgmma_fence();
    wgmma_add(sum, w, x, T()), wgmma_add(sum, w + 2, x + 2, T());
    wgmma_commit();
    wgmma_wait();
    pin(sum);
  }

  // The sums to shared memory, [m][row]; then all parts in the order of k.
  asm volatile("bar.sync 2, 256;" ::: "memory");
  float* sums = reinterpret_cast<float*>(smem);
#pragma unroll
  for (int j = 0; j < BM / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      sums[(8 * j + 2 * t + (e & 1)) * L::kStride + row + (e >> 1) * 8] = __int_as_float(sum[4 * j + e]);
  if (splits > 1)
    cluster_sync();
  else
    asm volatile("bar.sync 2, 256;" ::: "memory");
  // Each block of the cluster finishes its share of the rows: a thread always the same four, for several rows of x.
  const int rows = min(BM, a.m - m0), step = 256 >> log_share;
  for (int m = tid >> log_share; m < rows; m += step * kAtOnce) {
    float4 total[kAtOnce] = {};
    for (int p = 0; p < splits; p += kRanks) {
      float4 v[kRanks][kAtOnce];
#pragma unroll
      for (int q = 0; q < kRanks; ++q) {
        if (p + q >= splits) break;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const uint32_t at = (min(m + i * step, BM - 1) * L::kStride + r) * 4;
          v[q][i] =
              splits == 1 ? *reinterpret_cast<const float4*>(smem + at) : load_of_rank(base + at, p + q);
        }
      }
#pragma unroll
      for (int q = 0; q < kRanks; ++q) {
        if (p + q >= splits) break;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          total[i].x += v[q][i].x, total[i].y += v[q][i].y, total[i].z += v[q][i].z, total[i].w += v[q][i].w;
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (m + i * step >= rows || n >= a.n) continue;
      T* to = a.y + static_cast<int64_t>(m0 + m + i * step) * a.n + n;
      const uint2 pairs =
          make_uint2(pack(fmaf(total[i].x, scale[0], bias[0]), fmaf(total[i].y, scale[1], bias[1]), T()),
                     pack(fmaf(total[i].z, scale[2], bias[2]), fmaf(total[i].w, scale[3], bias[3]), T()));
      if (a.n % 4 == 0) {
        *reinterpret_cast<uint2*>(to) = pairs;
      } else {
        alignas(8) T each[4];
        *reinterpret_cast<uint2*>(each) = pairs;
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (n + e < a.n) to[e] = each[e];
      }
    }
  }
  if (splits > 1) cluster_leave();
#endif
}

template <class T, int BM>
const char* launch(const Linear8& a, const Rows8& rows, int log_splits) {
  using L = Few<BM>;
  CUtensorMap w, q;
  if (!int8_map(&w, a.weight, a.n, a.k, L::kRows) || !int8_map(&q, rows.q, a.m, a.k, BM))
    return "linear_int8: the driver refused a tensor map";
  int device = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = allow_shared_memory<few8<T, BM>>(device, L::kBytes);
  if (e != cudaSuccess) return cudaGetErrorString(e);
  const int m_tiles = static_cast<int>((a.m + BM - 1) / BM),
            n_tiles = static_cast<int>((a.n + L::kRows - 1) / L::kRows);
  cudaLaunchConfig_t config = {};
  config.gridDim = n_tiles * m_tiles << log_splits, config.blockDim = L::kThreads;
  config.dynamicSmemBytes = L::kBytes;
  config.stream = static_cast<cudaStream_t>(a.stream);
  cudaLaunchAttribute attributes[2];
  overlapping(attributes, 1 << log_splits);
  config.attrs = attributes, config.numAttrs = 2;
  e = cudaLaunchKernelEx(&config, few8<T, BM>, w, q, layer_of<T>(a, rows), log_splits, m_tiles);
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

template <int BM>
const char* launch_for(const Linear8& a, const Rows8& rows, int log_splits) {
  return a.dtype == DType::bfloat16 ? launch<__nv_bfloat16, BM>(a, rows, log_splits)
                                    : launch<__half, BM>(a, rows, log_splits);
}

}  // namespace

const char* linear_int8_few(const Linear8& a, const Rows8& rows, int columns, int log_splits) {
  if (log_splits >= 0 && log_splits <= 3 && (a.k + 127) / 128 >= 1 << log_splits) {
    switch (columns) {
      case 16:
        return launch_for<16>(a, rows, log_splits);
      case 32:
        return launch_for<32>(a, rows, log_splits);
      case 64:
        return launch_for<64>(a, rows, log_splits);
      case 128:
        return launch_for<128>(a, rows, log_splits);
    }
  }
  return "linear_int8: no such variant of the kernel for few rows";
}

const char* linear_int8_tensor(const Linear8& a) {
  const Rows8 rows = rows_of(a);
  if (const char* error = quantize_rows(a, rows)) return error;
  if (a.m <= 128) {
    const int columns = a.m <= 16 ? 16 : a.m <= 32 ? 32 : a.m <= 64 ? 64 : 128;
    // As many blocks as there are multiprocessors, of which clusters of more than two leave some free.
    const int64_t tiles = (a.n + 127) / 128, slices = (a.k + 127) / 128;
    int log_splits = 0;
    while (log_splits < 3 && tiles << (log_splits + 1) <= (log_splits == 0 ? 132 : 64) &&
           slices >> (log_splits + 1) >= 4)
      ++log_splits;
    return linear_int8_few(a, rows, columns, log_splits);
  }
  if (const char* error = collect_outliers(a, rows)) return error;
  // Waves of 66 clusters, by the time of one; as measured, narrow tiles take 1.5 times as long for an output.
  const auto waves = [&](int64_t columns) {
    return ((a.m + 255) / 256 * ((a.n + columns - 1) / columns) + 65) / 66 * columns;
  };
  return linear_int8_tile(a, rows, waves(256) <= waves(128) * 1.5 ? 256 : 128);
}

}  // namespace halfbyte::cuda
