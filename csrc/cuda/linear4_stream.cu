// linear4_stream.cu: y = x . dequantize(W)^T + bias for up to 16 rows of x, sm_90 and later.
//
// Layout    W[n][k / 2] packed: element 2i in the high nibble.  absmax[n][k / blocksize] float32, or uint8 codes of a
//           nested quantization.  x[m][k] and y[m][n] bf16 or fp16.
// Idea      A byte is a pair (k even, k odd): T[byte], its two levels, is one register of mma.m16n8k16's A operand, so
//           weights pass no arithmetic.  A sum over k has no order: lane t of a quad owns k = 16 t .. 16 t + 15 of each
//           block of 64, eight bytes as they lie, and x is read in the same order.  absmax multiplies the float32 sum
//           of a block of 64.
// Work      A CTA owns a run of tiles of 16 rows and takes up to TILES of them at a time, 1024 k a stage, of which each
//           of eight warps multiplies 128.  One more thread feeds the ring of W and x through the tensor copy engine
//           (three instructions a stage), three more warps feed the scales.  Sums meet in shared memory, in the order of
//           the warps.
// Limits    K % 256 == 0 and K % blocksize == 0, blocksize >= 64; pointers aligned to 16 bytes; N, K < 2^31.
// Bound by  memory: K / 2 + 4 K / blocksize bytes a row; next by the issue of about 13 instructions and 6.5 wavefronts of
//           the shared-memory pipe for every 256 weights.
#include "linear4.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kStage = 1024, kWarps = 8;  // k of a stage, warps that share it

// Shared memory: the table of pairs with the warps' sums in its gaps, then the rings.  The x ring's size goes by M.
template <int NT, int TILES, int DEPTH>
struct Layout {
  static constexpr int kWeights = TILES * 16 * kStage / 2, kScales = TILES * 16 * 64;
  static constexpr int kPartial = TILES * 16 * NT * 8;  // floats of a warp
  static constexpr int kW_at = kTable, kX_at = kW_at + DEPTH * kWeights;
  static_assert(kWarps * kPartial * 4 <= 32768);
  __host__ __device__ static constexpr int x_stage(int M) { return M * kStage * 2; }
  __host__ __device__ static constexpr int scales_at(int M) { return kX_at + DEPTH * x_stage(M); }
  __host__ __device__ static constexpr int codebook_at(int M) { return scales_at(M) + DEPTH * kScales; }
  __host__ __device__ static constexpr int barriers_at(int M) { return codebook_at(M) + 2048; }
  static constexpr int bytes(int M) { return barriers_at(M) + 3 * DEPTH * 8; }
};

// A place in the ring.
template <int DEPTH>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == DEPTH) stage = 0, parity ^= 1;
  }
};

// The sums of TN tiles over a warp's share of K, to its part of the shared sums.
template <typename T, int NT, int TILES, int DEPTH, int TN>
__device__ __forceinline__ void multiply(uint32_t base, int M, int stages, Turn<DEPTH>& turn) {
  using L = Layout<NT, TILES, DEPTH>;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const uint32_t full = base + L::barriers_at(M), s_full = full + 8 * DEPTH, empty = s_full + 8 * DEPTH;
  // Quad g takes row pi of a tile: with the swizzle of 64 bytes its 8-byte reads then meet no bank twice.
  const int pi = (g & 1) | (g & 2) << 1 | (g & 4) >> 1, swizzle = (pi >> 1) & 3;
  const uint32_t table = lane * 4;
  const uint32_t w_at = base + L::kW_at + warp * 1024 + pi * 64 + (((t >> 1) ^ swizzle) << 4) + (t & 1) * 8;
  const uint32_t s_at = base + L::scales_at(M) + pi * 64 + (((warp >> 1) ^ swizzle) << 4) + (warp & 1) * 8;
  float acc[TN][NT][4] = {};
  for (int i = 0; i < stages; ++i) {
    const uint32_t xs = base + L::kX_at + turn.stage * L::x_stage(M) + warp * M * 256;
    const uint32_t ws = w_at + turn.stage * L::kWeights, ss = s_at + turn.stage * L::kScales;
    mbarrier_wait(s_full + 8 * turn.stage, turn.parity);
    float2 s[TN][2];
#pragma unroll
    for (int j = 0; j < TN * 2; ++j) {
      const uint2 v = lds64(ss + j * 512);
      s[j >> 1][j & 1] = make_float2(__uint_as_float(v.x), __uint_as_float(v.y));
    }
    mbarrier_wait(full + 8 * turn.stage, turn.parity);
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      uint32_t x[NT][8];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        uint4 u = make_uint4(0, 0, 0, 0), v = u;
        const int m = g + n * 8, line = (warp * 2 + b) * M + m;  // the swizzle goes by the line of 128 bytes
        if (m < M) {
          const uint32_t at = xs + (b * M + m) * 128;
          u = lds128(at + (((t * 2) ^ (line & 7)) << 4));
          v = lds128(at + (((t * 2 + 1) ^ (line & 7)) << 4));
        }
        x[n][0] = u.x, x[n][1] = u.y, x[n][2] = u.z, x[n][3] = u.w;
        x[n][4] = v.x, x[n][5] = v.y, x[n][6] = v.z, x[n][7] = v.w;
      }
      const uint32_t wb = ws ^ (b << 5);
#pragma unroll
      for (int j = 0; j < TN; ++j) {
        const uint2 u = lds64(wb + j * 8192), v = lds64(wb + j * 8192 + 512);
        float part[NT][4] = {};
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const uint32_t p = q & 2 ? u.y : u.x, r = q & 2 ? v.y : v.x, byte = (q & 1) * 2;
          const uint32_t a0 = lookup(p, selector(byte), table), a1 = lookup(r, selector(byte), table);
          const uint32_t a2 = lookup(p, selector(byte + 1), table), a3 = lookup(r, selector(byte + 1), table);
#pragma unroll
          for (int n = 0; n < NT; ++n) mma(part[n], a0, a1, a2, a3, x[n][2 * q], x[n][2 * q + 1], T());
        }
        const float s0 = b ? s[j][0].y : s[j][0].x, s1 = b ? s[j][1].y : s[j][1].x;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          acc[j][n][0] = fmaf(part[n][0], s0, acc[j][n][0]);
          acc[j][n][1] = fmaf(part[n][1], s0, acc[j][n][1]);
          acc[j][n][2] = fmaf(part[n][2], s1, acc[j][n][2]);
          acc[j][n][3] = fmaf(part[n][3], s1, acc[j][n][3]);
        }
      }
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(empty + 8 * turn.stage);
    turn.next();
  }
  extern __shared__ __align__(1024) uint8_t smem[];
#pragma unroll
  for (int j = 0; j < TN; ++j)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = warp * L::kPartial + ((j * 16 + h * 8 + pi) * NT + n) * 8 + 2 * t;
        *reinterpret_cast<float2*>(smem + gap(at * 4)) = make_float2(acc[j][n][2 * h], acc[j][n][2 * h + 1]);
      }
}

template <typename T, int NT, int TILES, int DEPTH, bool NESTED>
__global__ void __launch_bounds__(384, 1)
    stream(const __grid_constant__ CUtensorMap wmap, const __grid_constant__ CUtensorMap xmap,
           const __grid_constant__ Levels levels, const __grid_constant__ Scales scales,
           const T* __restrict__ bias, T* __restrict__ y, int M, int N, int K) {
#ifdef HALFBYTE_SM90A
  using L = Layout<NT, TILES, DEPTH>;
  extern __shared__ __align__(1024) uint8_t smem[];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const uint32_t base = shared_address(smem);
  if (base != kTable_at) __trap();
  const uint32_t full = base + L::barriers_at(M), s_full = full + 8 * DEPTH, empty = s_full + 8 * DEPTH;
  const int64_t tiles = (N + 15) / 16;
  const int first = static_cast<int>(tiles * blockIdx.x / gridDim.x);
  const int count = static_cast<int>(tiles * (blockIdx.x + 1) / gridDim.x) - first;
  const int groups = (count + TILES - 1) / TILES, stages = (K + kStage - 1) / kStage;
  const auto begin = [&](int group) { return first + count * group / groups; };

  if (tid == 0) {
    for (int d = 0; d < DEPTH; ++d)
      mbarrier_init(full + 8 * d, 1), mbarrier_init(s_full + 8 * d, 96), mbarrier_init(empty + 8 * d, kWarps);
    mbarrier_init_done();
  }
  __syncthreads();

  if (warp == kWarps) {  // feeds W and x
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    if (lane == 0) {
      const uint64_t once = evict_first(), keep = evict_last();
      Turn<DEPTH> turn;
      bool waited = false;
      int early = 0;
      const auto fetch_x = [&](int at, int i) {
        copy_box(base + L::kX_at + at * L::x_stage(M), &xmap, 0, 0, i * (kStage / 64), full + 8 * at, keep);
      };
      for (int group = 0; group < groups; ++group) {
        const int t0 = begin(group), tn = begin(group + 1) - t0;
        for (int i = 0; i < stages; ++i) {
          if (!waited && early == DEPTH) {  // the ring is full of weights: now x
            wait_for_previous_kernel();
            let_next_kernel_start();
            waited = true;
            for (int d = 0; d < DEPTH; ++d) fetch_x(d, d % stages);
          }
          mbarrier_wait(empty + 8 * turn.stage, turn.parity ^ 1);
          const uint32_t bar = full + 8 * turn.stage;
          mbarrier_expect(bar, tn * 8192 + L::x_stage(M));
          for (int j = 0; j < tn; ++j)
            copy_box(base + L::kW_at + turn.stage * L::kWeights + j * 8192, &wmap, 0, (t0 + j) * 16,
                     i * kWarps, bar, once);
          if (waited)
            fetch_x(turn.stage, i);
          else
            ++early;
          turn.next();
        }
      }
      if (!waited) {
        wait_for_previous_kernel();
        let_next_kernel_start();
        for (int d = 0; d < early; ++d) fetch_x(d, d % stages);
      }
    }
  } else if (warp > kWarps) {  // feed the scales, four of a row at a time
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    const uint8_t* codebook = smem + L::codebook_at(M);
    const int worker = tid - (kWarps + 1) * 32;
    float offset = 0.f;
    if (NESTED) {
      for (int i = worker; i < 256; i += 96)
        *reinterpret_cast<float*>(smem + L::codebook_at(M) + (i >> 5) * 256 + (i & 31) * 4) =
            scales.nested_codebook[i];
      offset = *scales.offset;
      asm volatile("bar.sync 1, 96;" ::: "memory");
    }
    constexpr int kItems = TILES * 16 * 4, kEach = (kItems + 95) / 96;
    Turn<DEPTH> turn;
    for (int group = 0; group < groups; ++group) {
      const int row0 = begin(group) * 16, items = (begin(group + 1) * 16 - row0) * 4;
      for (int i = 0; i < stages; ++i) {
        RawScales<NESTED> raw[kEach];
#pragma unroll
        for (int r = 0; r < kEach; ++r) {
          const int item = r * 96 + worker, row = row0 + (item >> 2), k = i * kStage + (item & 3) * 256;
          if (item < items && row < N && k < K)
            raw[r].load(scales, row, k);
          else
            raw[r].clear();
        }
        mbarrier_wait(empty + 8 * turn.stage, turn.parity ^ 1);
        uint8_t* to = smem + L::scales_at(M) + turn.stage * L::kScales;
#pragma unroll
        for (int r = 0; r < kEach; ++r) {
          const int item = r * 96 + worker, row = item >> 2;
          if (item < items)
            *reinterpret_cast<float4*>(to + row * 64 + (((item & 3) ^ ((row >> 1) & 3)) << 4)) =
                raw[r].value(codebook, offset);
        }
        mbarrier_arrive(s_full + 8 * turn.stage);
        turn.next();
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    fill_table(smem, levels, tid, kWarps * 32);
    asm volatile("bar.sync 2, 256;" ::: "memory");
    Turn<DEPTH> turn;
    for (int group = 0; group < groups; ++group) {
      const int t0 = begin(group), tn = begin(group + 1) - t0;
      if (TILES >= 4 && tn == 4) multiply<T, NT, TILES, DEPTH, TILES >= 4 ? 4 : 1>(base, M, stages, turn);
      if (TILES >= 3 && tn == 3) multiply<T, NT, TILES, DEPTH, TILES >= 3 ? 3 : 1>(base, M, stages, turn);
      if (TILES >= 2 && tn == 2) multiply<T, NT, TILES, DEPTH, TILES >= 2 ? 2 : 1>(base, M, stages, turn);
      if (tn == 1) multiply<T, NT, TILES, DEPTH, 1>(base, M, stages, turn);
      asm volatile("bar.sync 2, 256;" ::: "memory");
      for (int i = tid; i < tn * 16 * M; i += kWarps * 32) {
        const int row = i % (tn * 16), m = i / (tn * 16), n = t0 * 16 + row;
        if (n < N) {
          float sum = 0.f;
#pragma unroll
          for (int w = 0; w < kWarps; ++w)
            sum += *reinterpret_cast<const float*>(smem + gap((w * L::kPartial + row * NT * 8 + m) * 4));
          if (bias) sum += to_float(bias[n]);
          from_float(sum, y + static_cast<int64_t>(m) * N + n);
        }
      }
      if (group + 1 < groups) asm volatile("bar.sync 2, 256;" ::: "memory");
    }
  }
#endif
}

template <typename T, int NT, int TILES, int DEPTH, bool NESTED>
const char* launch(const Linear4& a) {
  using L = Layout<NT, TILES, DEPTH>;
  CUtensorMap w, x;
  // W as [K / 128][N][64 bytes]: a box takes 16 rows and the 128 k of each warp.  x as [K / 64][M][64].
  const cuuint64_t w_dims[3] = {64, static_cast<cuuint64_t>(a.n), static_cast<cuuint64_t>(a.k / 128)};
  const cuuint64_t w_strides[2] = {static_cast<cuuint64_t>(a.k / 2), 64};
  const cuuint32_t w_box[3] = {64, 16, kWarps};
  const cuuint64_t x_dims[3] = {64, static_cast<cuuint64_t>(a.m), static_cast<cuuint64_t>(a.k / 64)};
  const cuuint64_t x_strides[2] = {static_cast<cuuint64_t>(a.k * 2), 128};
  const cuuint32_t x_box[3] = {64, static_cast<cuuint32_t>(a.m), kStage / 64};
  if (!encode_tensor_map(&w, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, a.weight.packed, w_dims, w_strides, w_box,
                         CU_TENSOR_MAP_SWIZZLE_64B) ||
      !encode_tensor_map(&x, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, a.x, x_dims, x_strides, x_box,
                         CU_TENSOR_MAP_SWIZZLE_128B))
    return "linear_4bit: the driver refused a tensor map";
  constexpr auto kernel = stream<T, NT, TILES, DEPTH, NESTED>;
  const int bytes = L::bytes(static_cast<int>(a.m));
  int device = 0, ctas = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&ctas, cudaDevAttrMultiProcessorCount, device);
  if (e == cudaSuccess) e = allow_shared_memory<stream<T, NT, TILES, DEPTH, NESTED>>(device, bytes);
  if (e != cudaSuccess) return cudaGetErrorString(e);
  const int tiles = static_cast<int>((a.n + 15) / 16), each = (tiles + ctas - 1) / ctas;
  cudaLaunchConfig_t config = {};
  config.gridDim = (tiles + each - 1) / each;  // no CTA has more than it must, and none less than it can
  config.blockDim = 384, config.dynamicSmemBytes = bytes, config.stream = static_cast<cudaStream_t>(a.stream);
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap, config.numAttrs = a.overlap;
  e = cudaLaunchKernelEx(&config, kernel, w, x, levels_of<T>(a.weight.format), scales_of(a),
                         static_cast<const T*>(a.bias), static_cast<T*>(a.y), static_cast<int>(a.m),
                         static_cast<int>(a.n), static_cast<int>(a.k));
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

template <int NT, int TILES, int DEPTH>
const char* launch_for(const Linear4& a) {
  const bool nested = a.weight.absmax.nested != nullptr;
  if (a.dtype == DType::bfloat16)
    return nested ? launch<__nv_bfloat16, NT, TILES, DEPTH, true>(a)
                  : launch<__nv_bfloat16, NT, TILES, DEPTH, false>(a);
  return nested ? launch<__half, NT, TILES, DEPTH, true>(a) : launch<__half, NT, TILES, DEPTH, false>(a);
}

}  // namespace

const char* linear_4bit_stream(const Linear4& a, int tiles, int depth) {
  if (a.m <= 8) {
    if (tiles == 4 && depth == 2) return launch_for<1, 4, 2>(a);
    if (tiles == 4 && depth == 3) return launch_for<1, 4, 3>(a);
  } else if (a.m <= 16) {
    if (tiles == 2 && depth == 2) return launch_for<2, 2, 2>(a);
    if (tiles == 2 && depth == 3) return launch_for<2, 2, 3>(a);
    if (tiles == 3 && depth == 2) return launch_for<2, 3, 2>(a);
    if (tiles == 4 && depth == 2) return launch_for<2, 4, 2>(a);
  }
  return "linear_4bit: no such variant of the streaming kernel";
}

}  // namespace halfbyte::cuda
