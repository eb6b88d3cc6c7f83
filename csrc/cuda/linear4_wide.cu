// linear4_wide.cu: y = x . dequantize(W)^T + bias for many rows of x, sm_90a.
//
// Layout    as in linear4_stream.cu.
// Idea      The weights are wgmma's A operand, from registers; x, as it lies, is its B operand in shared memory, whose
//           bandwidth is what is scarce.  So a weight is looked up in registers too: feeders round the 16 products of
//           levels and a block's scale to x's dtype and lay them down as a table; a byte permutation is four look-ups.
// Work      A block owns 128 rows of W and BM rows of x at a time and walks over such tiles.  Two warpgroups multiply, 64
//           rows of W each, 64 k a step, and decode one step ahead of the tensor cores.  A third one feeds: a thread x, a
//           thread W (4 steps a stage), two warps the tables.  The blocks of a cluster share k.
// Limits    K % 256 == 0 and K % blocksize == 0, blocksize >= 64; pointers aligned to 16 bytes; M, N, K < 2^31.
// Bound by  the tensor cores and the shared-memory pipe alike: with BM = 256 a step takes 1024 clocks of the former; of the
//           latter, 512 to read and 256 to write x and about 240 for W, its tables and scales.  With BM = 128 next by the
//           ALU: 11 instructions for four weights.
// Agrees    weights bit for bit with dequantize_4bit; sums are float32, rounded once.
#include "linear4_wide.cuh"
#include "wgmma.cuh"

namespace halfbyte::cuda {
namespace {

template <int BM>
struct Wide {
  static constexpr int kXDepth = BM == 256 ? 5 : 6, kWDepth = BM == 256 ? 2 : 4, kTDepth = 4;
  // Registers: what the launch gives (168 a thread), shared out anew; the sums must match or warps wait for ever.
  static constexpr int kRegisters = 216, kFeeders = 72;
  static_assert(2 * kRegisters + kFeeders == 3 * 168);
  static constexpr int kX = BM * 128, kW = 128 * 128, kT = 128 * 32;  // bytes of a stage
  static constexpr int kW_at = kXDepth * kX, kT_at = kW_at + kWDepth * kW, kOut_at = kT_at + kTDepth * kT;
  static constexpr int kCodebook_at = kOut_at + 2 * kOutBytes, kBarriers_at = kCodebook_at + 2048;
  static constexpr int kBytes = kBarriers_at + 16 * (kXDepth + kWDepth + kTDepth);
  static_assert(BM / 2 * 256 * 4 <= kT_at && kBytes <= 232448);
};

// The tables of a tile's stages, from two warps.  Rows from N on have weights of 0.
template <typename T, int BM, bool NESTED>
__device__ __forceinline__ void feed_tables(uint32_t base, const Scales& scales, const ExactLevels& levels,
                                            const uint8_t* codebook, float offset, int row0, int N, int first,
                                            int stages, uint32_t full, uint32_t empty,
                                            Turn<Wide<BM>::kTDepth>& turn) {
  using L = Wide<BM>;
  constexpr int kEach = 2;  // rows of a thread
  const int worker = threadIdx.x & 63;
  for (int s = first; s < first + stages; ++s) {
    RawScales<NESTED> raw[kEach];
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      const int n = row0 + r * 64 + worker;
      if (n < N)
        raw[r].load(scales, n, s * 256);
      else
        raw[r].clear();
    }
    float scale[kEach][4];
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      const bool there = row0 + r * 64 + worker < N;
      const float4 v = there ? raw[r].value(codebook, offset) : make_float4(0.f, 0.f, 0.f, 0.f);
      scale[r][0] = v.x, scale[r][1] = v.y, scale[r][2] = v.z, scale[r][3] = v.w;
    }
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      mbarrier_wait(empty + 8 * turn.at, turn.parity ^ 1);
      const uint32_t at = base + L::kT_at + turn.at * L::kT + worker * 16;
#pragma unroll
      for (int r = 0; r < kEach; ++r) {
        const Table t = table_of<T>(levels, scale[r][b]);
        sts128(at + r * 1024, t.high.x, t.high.y, t.high.z, t.high.w);
        sts128(at + r * 1024 + 2048, t.low.x, t.low.y, t.low.z, t.low.w);
      }
      mbarrier_arrive(full + 8 * turn.at);
      turn.next();
    }
  }
}

template <typename T, int BM>
__global__ void __launch_bounds__(384, 1)
    wide(const __grid_constant__ CUtensorMap wmap, const __grid_constant__ CUtensorMap xmap,
         const __grid_constant__ ExactLevels levels, const __grid_constant__ Scales scales,
         const __grid_constant__ Plan plan, const T* __restrict__ bias, T* __restrict__ y) {
#ifdef HALFBYTE_SM90A
  using L = Wide<BM>;
  extern __shared__ __align__(1024) uint8_t smem[];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int splits = plan.splits, begin = blockIdx.x / splits, split = blockIdx.x - begin * splits;
  const uint32_t base = shared_address(smem);
  const uint32_t x_full = base + L::kBarriers_at, x_empty = x_full + 8 * L::kXDepth;
  const uint32_t w_full = x_empty + 8 * L::kXDepth, w_empty = w_full + 8 * L::kWDepth;
  const uint32_t t_full = w_empty + 8 * L::kWDepth, t_empty = t_full + 8 * L::kTDepth;
  const int tiles = plan.m_tiles * plan.n_tiles, step = gridDim.x / splits;
  const int first = plan.stages * split / splits, stages = plan.stages * (split + 1) / splits - first;

  if (tid == 0) {
    if (base & 1023) __trap();
    for (int i = 0; i < L::kXDepth; ++i) mbarrier_init(x_full + 8 * i, 1), mbarrier_init(x_empty + 8 * i, 8);
    for (int i = 0; i < L::kWDepth; ++i) mbarrier_init(w_full + 8 * i, 1), mbarrier_init(w_empty + 8 * i, 8);
    for (int i = 0; i < L::kTDepth; ++i) mbarrier_init(t_full + 8 * i, 64), mbarrier_init(t_empty + 8 * i, 8);
    mbarrier_init_done();
  }
  __syncthreads();

  if (warp >= 8) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(L::kFeeders));
    if (warp == 8 && lane == 0) {
      const uint64_t keep = evict_last();
      Turn<L::kXDepth> turn;
      wait_for_previous_kernel();
      let_next_kernel_start();
      for (int i = begin; i < tiles; i += step) {
        const int m0 = Tile(plan, i).m * BM;
        for (int j = first * 4; j < (first + stages) * 4; ++j) {
          mbarrier_wait(x_empty + 8 * turn.at, turn.parity ^ 1);
          mbarrier_expect(x_full + 8 * turn.at, L::kX);
          copy_box(base + turn.at * L::kX, &xmap, j * 64, m0, x_full + 8 * turn.at, keep);
          turn.next();
        }
      }
    } else if (warp == 9 && lane == 0) {
      const uint64_t policy = plan.m_tiles > 1 ? evict_last() : evict_first();
      Turn<L::kWDepth> turn;
      for (int i = begin; i < tiles; i += step) {
        const int row0 = Tile(plan, i).n * 128;
        for (int s = first; s < first + stages; ++s) {
          mbarrier_wait(w_empty + 8 * turn.at, turn.parity ^ 1);
          mbarrier_expect(w_full + 8 * turn.at, L::kW);
          copy_box(base + L::kW_at + turn.at * L::kW, &wmap, s * 128, row0, w_full + 8 * turn.at, policy);
          turn.next();
        }
      }
    } else if (warp > 9) {
      const uint8_t* codebook = smem + L::kCodebook_at;
      Turn<L::kTDepth> turn;
      if (scales.nested_absmax) {
        const float offset = fill_codebook(smem + L::kCodebook_at, scales, tid & 63, 64);
        asm volatile("bar.sync 4, 64;" ::: "memory");
        for (int i = begin; i < tiles; i += step)
          feed_tables<T, BM, true>(base, scales, levels, codebook, offset, Tile(plan, i).n * 128, plan.N,
                                   first, stages, t_full, t_empty, turn);
      } else {
        for (int i = begin; i < tiles; i += step)
          feed_tables<T, BM, false>(base, scales, levels, codebook, 0.f, Tile(plan, i).n * 128, plan.N, first,
                                    stages, t_full, t_empty, turn);
      }
    }
    __syncwarp();
    if (splits > 1) cluster_sync(), cluster_leave();
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(L::kRegisters));

  const int g = lane >> 2, t = lane & 3, group = warp >> 2;
  const uint32_t select = t | (4 + t) << 4;  // byte t of two words
  const int row = group * 64 + (warp & 3) * 16 + g;
  Turn<L::kXDepth> xs;
  Turn<L::kWDepth> ws;
  Turn<L::kTDepth> ts;
  float acc[BM / 2];
  uint32_t a[2][4][4];  // A operands: one set multiplies, the other one is decoded
  // The operands of step b of a stage.
  const auto operands = [&](uint32_t (&to)[4][4], int b) {
    if (b == 0) mbarrier_wait(w_full + 8 * ws.at, ws.parity);
    mbarrier_wait(t_full + 8 * ts.at, ts.parity);
    const uint32_t w = base + L::kW_at + ws.at * L::kW + row * 128 + (((2 * b) ^ g) << 4);
    const uint32_t at = base + L::kT_at + ts.at * L::kT + row * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 p = lds128(w + half * 1024), q = lds128((w ^ 16) + half * 1024);
      const Table table = {lds128(at + half * 128), lds128(at + half * 128 + 2048)};
      const uint32_t codes[4] = {permute(p.x, p.y, select), permute(p.z, p.w, select),
                                 permute(q.x, q.y, select), permute(q.z, q.w, select)};
      uint32_t first[4], second[4];
      decode(codes, table, first, second);
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i][half] = first[i], to[i][2 + half] = second[i];
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(t_empty + 8 * ts.at);
    ts.next();
    if (b < 3) return;
    if (lane == 0) mbarrier_arrive(w_empty + 8 * ws.at);
    ws.next();
  };
  int before = 0;  // the stage of x before this one
  // Multiplies step b with `now`; `then` gets the operands that follow.
  const auto product = [&](int b, bool starts, bool ends, uint32_t (&now)[4][4], uint32_t (&then)[4][4]) {
    mbarrier_wait(x_full + 8 * xs.at, xs.parity);
    const uint64_t x = swizzled_rows(base + xs.at * L::kX);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma(acc, now[k], x + 2 * k, k > 0 || !starts, T());
    wgmma_commit();
    wgmma_wait<1>();  // the product before, which read `then`
    if (!starts && lane == 0) mbarrier_arrive(x_empty + 8 * before);
    before = xs.at, xs.next();
    if (!ends) operands(then, (b + 1) & 3);
  };

  operands(a[0], 0);
  for (int i = begin; i < tiles; i += step) {
    const Tile tile(plan, i);
    const bool last = i + step >= tiles;
    for (int s = 0; s < stages; ++s) {
#pragma unroll 1
      for (int b = 0; b < 4; b += 2) {
        product(b, s == 0 && b == 0, false, a[0], a[1]);
        product(b + 1, false, last && s == stages - 1 && b == 2, a[1], a[0]);
      }
    }
    wgmma_wait();
    if (lane == 0) mbarrier_arrive(x_empty + 8 * before);
    const Target<T> to = {y, bias, tile.m * BM, tile.n * 128 + group * 64,
                          base + L::kOut_at + group * kOutBytes};
    if (splits > 1) {
      store_sums_of_cluster<T, BM>(acc, base, split, to, plan);
      cluster_leave();
      return;
    }
    store_sums<T, BM>(acc, to, plan);
  }
#endif
}

template <typename T, int BM>
const char* launch(const Linear4& a, int splits) {
  using L = Wide<BM>;
  CUtensorMap w, x;
  const cuuint64_t w_dims[2] = {static_cast<cuuint64_t>(a.k / 2), static_cast<cuuint64_t>(a.n)};
  const cuuint64_t w_strides[1] = {static_cast<cuuint64_t>(a.k / 2)};
  const cuuint32_t w_box[2] = {128, 128};
  const cuuint64_t x_dims[2] = {static_cast<cuuint64_t>(a.k), static_cast<cuuint64_t>(a.m)};
  const cuuint64_t x_strides[1] = {static_cast<cuuint64_t>(a.k * 2)};
  const cuuint32_t x_box[2] = {64, BM};
  if (!encode_tensor_map(&w, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, a.weight.packed, w_dims, w_strides, w_box,
                         CU_TENSOR_MAP_SWIZZLE_128B) ||
      !encode_tensor_map(&x, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, a.x, x_dims, x_strides, x_box,
                         CU_TENSOR_MAP_SWIZZLE_128B))
    return "linear_4bit: the driver refused a tensor map";
  const Plan plan = plan_of(a, BM, splits);
  return launch_tiles<wide<T, BM>>(a, plan, 384, L::kBytes, w, x, exact_levels(a.weight.format), scales_of(a),
                                   plan, static_cast<const T*>(a.bias), static_cast<T*>(a.y));
}

template <int BM>
const char* launch_for(const Linear4& a, int splits) {
  return a.dtype == DType::bfloat16 ? launch<__nv_bfloat16, BM>(a, splits) : launch<__half, BM>(a, splits);
}

}  // namespace

const char* linear_4bit_wide(const Linear4& a, int columns, int splits) {
  if (splits >= 1 && splits <= kMostSplits) {
    if (columns == 128) return launch_for<128>(a, splits);
    if (columns == 256) return launch_for<256>(a, splits);
  }
  return "linear_4bit: no such variant of the wide kernel";
}

}  // namespace halfbyte::cuda
