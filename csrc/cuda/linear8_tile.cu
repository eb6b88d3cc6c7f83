// linear8_tile.cu: LLM.int8()'s product of many rows of x, sm_90a.
//
// In        quantized rows and the names of outlier columns, from quantize8_rows.cu; the weight int8 [n, k].
// Work      Two warpgroups multiply 64 x BN outputs each, of a tile of 128 x BN; one thread feeds their ring, 128 of k a
//           stage.  A cluster of two has two tiles below each other, and each block copies half of the weight's rows for
//           both.  Meanwhile three warps make what ends a tile: scales, bias and the operands of a few outlier columns,
//           for wgmma in 16 bits onto the scaled sums.  More have been collected by collect8.cu, and come through the ring;
//           what it had no room for those who multiply gather themselves.
// Limits    those of gemm8.h.
// Bound by  the tensor cores.
// Agrees    integer sums exactly; then within the op's tolerance: in float32, rounded once.
#include "outliers.cuh"
#include "wgmma8.cuh"

namespace halfbyte::cuda {
namespace {

template <int BN>
struct Tile8 {
  static constexpr int kRows = 128, kThreads = 384, kDepth = BN == 256 ? 4 : 6;
  // Registers: what the launch gives (168 a thread), shared out anew.
  static constexpr int kRegisters = 208, kFeederRegisters = 88;
  static_assert(2 * kRegisters + kFeederRegisters == 3 * 168);
  static constexpr int kA = kRows * 128, kB = BN * 128;
  static constexpr int kB_at = kDepth * kA, kX_at = kB_at + kDepth * kB, kWeight_at = kX_at + kRows * 64;
  static constexpr int kScales_at = kWeight_at + BN * 64;  // floats: of rows, of columns, bias
  static constexpr int kMask_at = kScales_at + 4 * (kRows + 2 * BN), kBarriers_at = kMask_at + kMostK8 / 8;
  static constexpr int kBytes = kBarriers_at + 8 * (2 * kDepth + 2) + static_cast<int>(sizeof(Found));
  static_assert(kBytes <= 232448);
};

// Tiles in bands of eight pairs of rows, so that those under way share what L2 holds.
struct Order {
  int pairs, across;
  __device__ __forceinline__ int2 at(int tile) const {  // pair, column
    const int band = tile / (8 * across), rows = min(8, pairs - band * 8), within = tile - band * 8 * across;
    return make_int2(band * 8 + within % rows, within / rows);
  }
};

// Words of four neighbouring lanes: lane t of four gets word t of each.
__device__ __forceinline__ uint4 transpose(uint4 v, int t) {
  const bool odd = t & 1, high = t & 2;
  const uint32_t a = __shfl_xor_sync(0xffffffffu, odd ? v.x : v.y, 1),
                 b = __shfl_xor_sync(0xffffffffu, odd ? v.z : v.w, 1);
  if (odd)
    v.x = a, v.z = b;
  else
    v.y = a, v.w = b;
  const uint32_t c = __shfl_xor_sync(0xffffffffu, high ? v.x : v.z, 2),
                 d = __shfl_xor_sync(0xffffffffu, high ? v.y : v.w, 2);
  if (high)
    v.x = c, v.y = d;
  else
    v.z = c, v.w = d;
  return v;
}

// Of so many outlier columns those that collect8.cu has collected.
__device__ __forceinline__ int collected_of(const Rows8& rows, int count) {
  return rows.x != nullptr && count > kFewOutliers ? min(count, rows.room) : 0;
}

template <class T, int BN>
__global__ void __launch_bounds__(384, 1)
    tile8(const __grid_constant__ CUtensorMap qmap, const __grid_constant__ CUtensorMap wmap,
          const __grid_constant__ CUtensorMap collected_x,
          const __grid_constant__ CUtensorMap collected_weight, const __grid_constant__ Layer8<T> a,
          const Order order) {
#ifdef HALFBYTE_SM90A
  using L = Tile8<BN>;
  extern __shared__ __align__(1024) uint8_t smem[];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const uint32_t base = shared_address(smem), rank = cluster_rank();
  const uint32_t full = base + L::kBarriers_at, empty = full + 8 * L::kDepth, made = empty + 8 * L::kDepth,
                 used = made + 8;
  Found* found = reinterpret_cast<Found*>(smem + L::kBarriers_at + 8 * (2 * L::kDepth + 2));
  float* row_scales = reinterpret_cast<float*>(smem + L::kScales_at);
  float *column_scales = row_scales + L::kRows, *bias = column_scales + BN;
  const int slices = (a.k + 127) / 128, tiles = order.pairs * order.across;
  const int first_tile = blockIdx.x >> 1, step = gridDim.x >> 1;

  if (tid == 0) {
    for (int i = 0; i < L::kDepth; ++i) mbarrier_init(full + 8 * i, 1), mbarrier_init(empty + 8 * i, 16);
    mbarrier_init(made, kFeeders), mbarrier_init(used, 256);
    mbarrier_init_done();
  }
  cluster_sync();

  if (warp >= 8) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(L::kFeederRegisters));
    const int worker = tid - 9 * 32;
    if (worker >= 0) {
      wait_for_previous_kernel();
      if (a.rows.x != nullptr) {
        if (worker == 0) found->count = __ldcg(a.rows.count);
      } else if (a.rows.named)
        list_outliers(a.rows, 0, slices, reinterpret_cast<uint32_t*>(smem + L::kMask_at), found, worker);
      else if (worker == 0)
        found->count = 0;
      feeders_sync();
      const int collected = collected_of(a.rows, found->count), listed = found->count - collected;
      uint32_t turn = 1;
      for (int tile = first_tile; tile < tiles; tile += step, turn ^= 1) {
        const int2 at = order.at(tile);
        const int m0 = (2 * at.x + rank) * L::kRows, n0 = at.y * BN;
        mbarrier_wait(used, turn);
        for (int i = worker; i < L::kRows; i += kFeeders)
          row_scales[i] = m0 + i < a.m ? a.rows.absmax[m0 + i] * kPer127 : 0.f;
        for (int i = worker; i < BN; i += kFeeders) {
          const bool there = n0 + i < a.n;
          column_scales[i] = there ? a.weight_absmax[n0 + i] * kPer127 : 0.f;
          bias[i] = there && a.bias ? to_float(a.bias[n0 + i]) : 0.f;
        }
        if (listed > 0) {
          if (listed > kGathered || a.rows.x != nullptr) {  // those who multiply leave others here
            feeders_sync();
            if (worker < min(listed, kGathered))
              found->columns[worker] = __ldcg(a.rows.list + collected + worker);
            feeders_sync();
          }
          const int some = min(listed, kGathered);
          gather_weight<T, BN, kFeeders>(smem + L::kWeight_at, a, n0, found->columns, some, worker);
          gather_x<T, L::kRows, kFeeders>(smem + L::kX_at, a, m0, found->columns, some, worker);
          show_to_wgmma();
        }
        mbarrier_arrive(made);
      }
    } else if (lane == 0) {
      const uint64_t keep = evict_last();
      wait_for_previous_kernel();
      let_next_kernel_start();
      const int collected = a.rows.x == nullptr ? 0 : collected_of(a.rows, __ldcg(a.rows.count));
      const int all = slices + (collected + 63) / 64;
      int stage = 0;
      uint32_t turn = 1;
      for (int tile = first_tile; tile < tiles; tile += step) {
        const int2 at = order.at(tile);
        const int m0 = (2 * at.x + rank) * L::kRows, n0 = at.y * BN + rank * (BN / 2);
        for (int i = 0; i < all; ++i) {
          const bool integers = i < slices;
          const int k = integers ? i * 128 : (i - slices) * 64;  // 128 bytes of a row
          mbarrier_wait(empty + 8 * stage, turn);
          mbarrier_expect(full + 8 * stage, L::kA + L::kB);
          copy_box(base + stage * L::kA, integers ? &qmap : &collected_x, k, m0, full + 8 * stage, keep);
          copy_box_to_all(base + L::kB_at + stage * L::kB + rank * (L::kB / 2),
                          integers ? &wmap : &collected_weight, k, n0, full + 8 * stage, 3, keep);
          if (++stage == L::kDepth) stage = 0, turn ^= 1;
        }
      }
    }
    __syncwarp();
    cluster_sync();
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(L::kRegisters));
  const int half = warp >> 2, g = lane >> 2, t = lane & 3, row = half * 64 + (warp & 3) * 16 + g;
  int stage = 0;
  uint32_t parity = 0, turn = 0;
  const auto release = [&](int of) {
    if (lane < 2) mbarrier_arrive_of_rank(empty + 8 * of, lane);
  };
  for (int tile = first_tile; tile < tiles; tile += step, turn ^= 1) {
    int sum[BN / 2];
    int before = 0;
    // Products of what comes through the ring, one group of them under way.
    const auto multiply = [&](int count, const auto& product) {
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        mbarrier_wait(full + 8 * stage, parity);
        const uint64_t x = swizzled_rows(base + stage * L::kA + half * 64 * 128),
                       w = swizzled_rows(base + L::kB_at + stage * L::kB);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) product(x + 2 * k, w + 2 * k, i | k);
        wgmma_commit();
        wgmma_wait<1>();
        if (i > 0) release(before);
        before = stage;
        if (++stage == L::kDepth) stage = 0, parity ^= 1;
      }
      wgmma_wait();
      pin(sum);
      release(before);
    };
    multiply(slices, [&](uint64_t x, uint64_t w, int follows) { wgmma(sum, x, w, follows); });

    const int2 at = order.at(tile);
    const int m0 = (2 * at.x + rank) * L::kRows, n0 = at.y * BN;
    mbarrier_wait(made, turn);
    const float low = row_scales[row], high = row_scales[row + 8];
#pragma unroll
    for (int i = 0; i < BN / 2; ++i)
      sum[i] = __float_as_int(static_cast<float>(sum[i]) * (i & 2 ? high : low));
    const int collected = collected_of(a.rows, found->count), listed = found->count - collected;
    if (collected > 0)
      multiply((collected + 63) / 64, [&](uint64_t x, uint64_t w, int) { wgmma_add(sum, x, w, T()); });
    for (int first = 0; first < listed; first += kGathered) {
      const int some = min(listed - first, kGathered);
      if (first > 0) {
        asm volatile("bar.sync 2, 256;" ::: "memory");
        if (tid < some) found->columns[tid] = __ldcg(a.rows.list + collected + first + tid);
        asm volatile("bar.sync 2, 256;" ::: "memory");
        gather_weight<T, BN, 256>(smem + L::kWeight_at, a, n0, found->columns, some, tid);
        gather_x<T, L::kRows, 256>(smem + L::kX_at, a, m0, found->columns, some, tid);
        show_to_wgmma();
        asm volatile("bar.sync 2, 256;" ::: "memory");
      }
      const uint64_t x = rows_of_64(base + L::kX_at + half * 64 * 64), w = rows_of_64(base + L::kWeight_at);
      wgmma_fence();
      wgmma_add(sum, x, w, T()), wgmma_add(sum, x + 2, w + 2, T());
      wgmma_commit();
      wgmma_wait();
      pin(sum);
    }
    const int m = m0 + row;
#pragma unroll
    for (int j = 0; j < BN / 8; j += 4) {
      uint4 pairs[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 8 * (j + i) + 2 * t;
        const float2 s = *reinterpret_cast<const float2*>(column_scales + column);
        const float2 b = *reinterpret_cast<const float2*>(bias + column);
        const int* of = sum + 4 * (j + i);
        (&pairs[0].x)[i] =
            pack(fmaf(__int_as_float(of[0]), s.x, b.x), fmaf(__int_as_float(of[1]), s.y, b.y), T());
        (&pairs[1].x)[i] =
            pack(fmaf(__int_as_float(of[2]), s.x, b.x), fmaf(__int_as_float(of[3]), s.y, b.y), T());
      }
      const int n = n0 + 8 * (j + t);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint4 v = transpose(pairs[r], t);
        if (m + 8 * r >= a.m) continue;
        T* to = a.y + static_cast<int64_t>(m + 8 * r) * a.n + n;
        if (n + 8 <= a.n && a.n % 8 == 0) {
          *reinterpret_cast<uint4*>(to) = v;
        } else {
          alignas(16) T each[8];
          *reinterpret_cast<uint4*>(each) = v;
#pragma unroll
          for (int i = 0; i < 8; ++i)
            if (n + i < a.n) to[i] = each[i];
        }
      }
    }
    mbarrier_arrive(used);
  }
  cluster_sync();  // the other block may still be about to signal here
#endif
}

bool collected_map(CUtensorMap* map, const void* p, int64_t rows, int room, int box_rows) {
  const cuuint64_t dims[2] = {static_cast<cuuint64_t>(room), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(room) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)};
  return encode_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, p, dims, strides, box,
                           CU_TENSOR_MAP_SWIZZLE_128B);
}

template <class T, int BN>
const char* launch(const Linear8& a, const Rows8& rows) {
  using L = Tile8<BN>;
  CUtensorMap q, w;
  if (!int8_map(&q, rows.q, a.m, a.k, L::kRows) || !int8_map(&w, a.weight, a.n, a.k, BN / 2))
    return "linear_int8: the driver refused a tensor map";
  CUtensorMap x = q, weight = w;  // nobody reads them where nothing is collected
  if (rows.x != nullptr && (!collected_map(&x, rows.x, a.m, rows.room, L::kRows) ||
                            !collected_map(&weight, rows.weight, a.n, rows.room, BN / 2)))
    return "linear_int8: the driver refused a tensor map";
  int device = 0, processors = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = allow_shared_memory<tile8<T, BN>>(device, L::kBytes);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (e != cudaSuccess) return cudaGetErrorString(e);
  const Order order = {static_cast<int>((a.m + 2 * L::kRows - 1) / (2 * L::kRows)),
                       static_cast<int>((a.n + BN - 1) / BN)};
  const int tiles = order.pairs * order.across;
  cudaLaunchConfig_t config = {};
  config.gridDim = 2 * (tiles < processors / 2 ? tiles : processors / 2), config.blockDim = L::kThreads;
  config.dynamicSmemBytes = L::kBytes;
  config.stream = static_cast<cudaStream_t>(a.stream);
  cudaLaunchAttribute attributes[2];
  overlapping(attributes, 2);
  config.attrs = attributes, config.numAttrs = 2;
  e = cudaLaunchKernelEx(&config, tile8<T, BN>, q, w, x, weight, layer_of<T>(a, rows), order);
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

}  // namespace

const char* linear_int8_tile(const Linear8& a, const Rows8& rows, int columns) {
  const bool brain = a.dtype == DType::bfloat16;
  if (columns == 256) return brain ? launch<__nv_bfloat16, 256>(a, rows) : launch<__half, 256>(a, rows);
  if (columns == 128) return brain ? launch<__nv_bfloat16, 128>(a, rows) : launch<__half, 128>(a, rows);
  return "linear_int8: no such variant of the tiled kernel";
}

}  // namespace halfbyte::cuda
