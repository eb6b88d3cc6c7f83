// scale8.cu: y from the integer sums of an int8 product that was made elsewhere, with LLM.int8()'s outlier columns.
//
// In, out   sums int32 [m, n], in which outlier columns count as zeros; x in its dtype, read in these columns alone
// Work      tiles of 64 x 128 outputs.  Outlier columns, a list with a count on the device, go through shared memory 32
//           at a time and are multiplied as x's dtype, which holds the weight's integers exactly: in tensor cores
//           where there are some.
// Bound by  memory with few outlier columns: 6 bytes per output.
// Agrees    within the op's tolerance: sums in fp32, rounded once.
#include "linear8.cuh"

namespace halfbyte::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kScaleRows = 64, kScaleColumns = 128, kListed = 32;  // a tile; outlier columns at a time
constexpr int kListPitch = kListed + 8;                            // eight rows of fragments lie in all banks

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
constexpr bool kTensorCores = true;
#else
constexpr bool kTensorCores = false;
#endif

// What outlier columns add to 32 x 32 outputs of a warp, as fragments of mma.m16n8k16 lie: pairs of columns.
struct Fragments {
  float sum[2][2][4][2] = {};

  static HALFBYTE_DEVICE int row(int i, int half) {
    return static_cast<int>(threadIdx.x) / 128 * 32 + i * 16 + half * 8 +
           static_cast<int>(threadIdx.x) % 32 / 4;
  }
  static HALFBYTE_DEVICE int column(int j) {
    return static_cast<int>(threadIdx.x) / 32 % 4 * 32 + j * 8 + static_cast<int>(threadIdx.x) % 4 * 2;
  }

  // Adds x [rows][kListPitch] @ weight [columns][kListPitch]^T over `listed` columns, zeros up to the next 16.
  template <class T>
  HALFBYTE_DEVICE void add(const T* x, const T* weight, int listed) {
    if constexpr (kTensorCores && sizeof(T) == 2) {
      const auto word = [](const T* from) { return *reinterpret_cast<const uint32_t*>(from); };
      const int quad = static_cast<int>(threadIdx.x) % 4 * 2,
                lane_row = static_cast<int>(threadIdx.x) % 32 / 4;
      for (int k = 0; k < listed; k += 16) {
        uint32_t a[2][4], b[4][2];
        HALFBYTE_UNROLL
        for (int i = 0; i < 2; ++i) {
          HALFBYTE_UNROLL
          for (int part = 0; part < 4; ++part)
            a[i][part] = word(x + row(i, part % 2) * kListPitch + k + part / 2 * 8 + quad);
        }
        HALFBYTE_UNROLL
        for (int j = 0; j < 4; ++j) {
          const T* from = weight + (column(j) - quad + lane_row) * kListPitch + k + quad;
          b[j][0] = word(from);
          b[j][1] = word(from + 8);
        }
        HALFBYTE_UNROLL
        for (int i = 0; i < 2; ++i) {
          HALFBYTE_UNROLL
          for (int j = 0; j < 4; ++j) multiply<T>(a[i], b[j], sum[i][0][j], sum[i][1][j]);
        }
      }
    } else {
      for (int k = 0; k < listed; ++k) {
        HALFBYTE_UNROLL
        for (int i = 0; i < 16; ++i) {
          const float v = widen(x[row(i / 8, i / 4 % 2) * kListPitch + k]);
          HALFBYTE_UNROLL
          for (int c = 0; c < 2; ++c) {
            float& to = sum[i / 8][i / 4 % 2][i % 4][c];
            to = fmaf(v, widen(weight[(column(i % 4) + c) * kListPitch + k]), to);
          }
        }
      }
    }
  }

  template <class T>
  static HALFBYTE_DEVICE void multiply(const uint32_t* a, const uint32_t* b, float* low, float* high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define HALFBYTE_MMA(type)                                       \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type     \
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "             \
      "{%0,%1,%2,%3};"                                           \
      : "+f"(low[0]), "+f"(low[1]), "+f"(high[0]), "+f"(high[1]) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
    if constexpr (std::is_same_v<T, Half>) {
      HALFBYTE_MMA("f16");
    } else {
      HALFBYTE_MMA("bf16");
    }
#undef HALFBYTE_MMA
#endif
  }
};

// y from integer sums in which outlier columns are 0, and from x in these columns, which go through shared memory
// `kListed` at a time; T holds the weight's integers exactly.
template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(Product<T> p, const int32_t* __restrict__ sums) {
  alignas(16) __shared__ T of_x[kScaleRows * kListPitch];
  alignas(16) __shared__ T of_weight[kScaleColumns * kListPitch];
  const int64_t m0 = int64_t{blockIdx.x} * kScaleRows, n0 = int64_t{blockIdx.y} * kScaleColumns;
  const int size = p.list != nullptr ? *p.size : 0;
  const int at = static_cast<int>(threadIdx.x) % kListed, group = static_cast<int>(threadIdx.x) / kListed;
  Fragments exact;
  for (int first = 0; first < size; first += kListed) {
    const bool listed = first + at < size;
    const int64_t k = listed ? p.list[first + at] : 0;
    __syncthreads();
    for (int row = group; row < kScaleRows; row += kThreads / kListed) {
      const bool there = listed && m0 + row < p.m;
      of_x[row * kListPitch + at] = there ? p.x[(m0 + row) * p.k + k] : narrow<T>(0.0f);
    }
    for (int column = group; column < kScaleColumns; column += kThreads / kListed) {
      const bool there = listed && n0 + column < p.n;
      const float w = there ? static_cast<float>(p.weight[(n0 + column) * p.k + k]) : 0.0f;
      of_weight[column * kListPitch + at] = narrow<T>(w);
    }
    __syncthreads();
    exact.add(of_x, of_weight, size - first < kListed ? size - first : kListed);
  }
  HALFBYTE_UNROLL
  for (int i = 0; i < 16; ++i) {
    const int64_t m = m0 + Fragments::row(i / 8, i / 4 % 2), n = n0 + Fragments::column(i % 4);
    if (m >= p.m || n >= p.n) continue;
    const float* found = exact.sum[i / 8][i / 4 % 2][i % 4];
    const Words<8> whole = load<8>(sums + m * p.n + n);
    float y[2];
    HALFBYTE_UNROLL
    for (int c = 0; c < 2; ++c)
      y[c] = scaled(p, m, n + c, static_cast<int32_t>(whole.w[c]),
                    found[c] * (p.weight_absmax[n + c] * kPer127));
    if constexpr (sizeof(T) == 4) {
      const Words<8> words = {as_bits(y[0]), as_bits(y[1])};
      store<8>(p.y + m * p.n + n, words);
    } else {
      const Words<4> words = {narrow2<T>(y[0], y[1])};
      store<4>(p.y + m * p.n + n, words);
    }
  }
}

}  // namespace

const char* scale_int8(const void* x, DType dtype, Quantized quantized, const int32_t* sums,
                       const int8_t* weight, const float* weight_absmax, const void* bias, int64_t m,
                       int64_t n, int64_t k, void* y, void* stream) {
  if (n % 2 != 0 || !aligned(sums, 8)) return "scale_int8 takes output columns in pairs";
  const int64_t across = ceil_div(n, kScaleColumns);
  if (across > 65535) return "scale_int8 takes at most 8388480 output columns";
  return with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const Product<T> p = {nullptr,
                          static_cast<const T*>(x),
                          weight,
                          m,
                          n,
                          k,
                          quantized.absmax,
                          weight_absmax,
                          static_cast<const T*>(bias),
                          quantized.list,
                          quantized.size,
                          static_cast<T*>(y)};
    const dim3 grid(static_cast<unsigned>(ceil_div(m, kScaleRows)), static_cast<unsigned>(across));
    HALFBYTE_LAUNCH((scale_kernel<T>), grid, kThreads, 0, stream, p, sums);
    return launched();
  });
}

}  // namespace halfbyte::gpu
