// linear4.cu: y = x @ dequantized 4-bit weight^T + bias, for few rows of x.
//
// Work      one warp per output column n and up to 4 rows of x: a lane reads 16 bytes of the weight's row (32
//           codes, of one block), looks the levels up in its own banks, multiplies them with x from L1 in fp32
//           and scales the partial sum once per block; then a sum over the lanes, in fixed order.  Where rows
//           are no multiple of 32 codes, code by code.
// Limits    x aligned to 16 bytes; blocksize a power of two >= 32.
// Bound by  look-ups and multiplications, one each per weight and row; at one row near the memory.
// Agrees    within the op's tolerance: the weight stays exact where the reference rounds it to x's dtype.
#include "fourbit.cuh"
#include "halfbyte/gpu.h"

namespace halfbyte::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kCodes = 32;  // per lane and step

template <class T>
struct Linear4 {
  const T* x;
  Weight4 weight;
  Levels levels;
  int shift;
  const T* bias;
  int64_t m, n, k;
  T* y;
};

template <class T, int Lanes, int Rows, bool Nested, bool Whole>
__global__ void __launch_bounds__(kThreads) linear_4bit_kernel(Linear4<T> p) {
  __shared__ Tables4 tables;
  fill_tables(tables, p.levels, p.weight.absmax);
  const float offset = Nested ? *p.weight.absmax.offset : 0.0f;
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % Lanes, warps = kThreads / Lanes;
  const int64_t m0 = int64_t{blockIdx.y} * Rows;
  const int64_t step = int64_t{gridDim.x} * warps;
  for (int64_t n = int64_t{blockIdx.x} * warps + threadIdx.x / Lanes; n < p.n; n += step) {
    float sum[Rows] = {};
    if constexpr (Whole) {
      for (int64_t k = lane * kCodes; k < p.k; k += Lanes * kCodes) {
        const int64_t element = n * p.k + k;
        const Words<16> words = load<16>(p.weight.packed + element / 2);
        const float scale = scale_of<Nested>(tables, p.weight.absmax, offset, element >> p.shift);
        float part[Rows] = {};
        HALFBYTE_UNROLL
        for (int word = 0; word < 4; ++word) {
          float level[8];
          HALFBYTE_UNROLL
          for (int i = 0; i < 8; ++i) {
            level[i] = level_of(tables, words.w[word] >> (i / 2 * 8 + (i % 2 == 0 ? 4 : 0)) & 15u);
          }
          HALFBYTE_UNROLL
          for (int r = 0; r < Rows; ++r) {
            if (m0 + r >= p.m) break;
            const T* at = p.x + (m0 + r) * p.k + k + word * 8;
            float v[8];
            HALFBYTE_UNROLL
            for (int i = 0; i < 8; i += 16 / sizeof(T)) widen_all<T>(load<16>(at + i), v + i);
            HALFBYTE_UNROLL
            for (int i = 0; i < 8; ++i) part[r] = fmaf(level[i], v[i], part[r]);
          }
        }
        HALFBYTE_UNROLL
        for (int r = 0; r < Rows; ++r) sum[r] = fmaf(part[r], scale, sum[r]);
      }
    } else {
      for (int64_t k = lane; k < p.k; k += Lanes) {
        const int64_t element = n * p.k + k;
        const uint32_t code = p.weight.packed[element >> 1] >> (element & 1 ? 0 : 4) & 15u;
        const float scale = scale_of<Nested>(tables, p.weight.absmax, offset, element >> p.shift);
        const float w = level_of(tables, code) * scale;
        HALFBYTE_UNROLL
        for (int r = 0; r < Rows; ++r) {
          if (m0 + r < p.m) sum[r] = fmaf(w, widen(p.x[(m0 + r) * p.k + k]), sum[r]);
        }
      }
    }
    HALFBYTE_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const float total = warp_sum<Lanes>(sum[r]);
      if (lane == 0 && m0 + r < p.m) {
        const float bias = p.bias != nullptr ? widen(p.bias[n]) : 0.0f;
        p.y[(m0 + r) * p.n + n] = narrow<T>(total + bias);
      }
    }
  }
}

template <class T, int Lanes, int Rows, bool Nested>
const char* launch(const Linear4<T>& p, void* stream) {
  const bool whole = p.k % kCodes == 0 && aligned(p.weight.packed, 16);
  const dim3 grid(grid_for(ceil_div(p.n, kThreads / Lanes), 32), static_cast<unsigned>(ceil_div(p.m, Rows)));
  if (whole) {
    HALFBYTE_LAUNCH((linear_4bit_kernel<T, Lanes, Rows, Nested, true>), grid, kThreads, 0, stream, p);
  } else {
    HALFBYTE_LAUNCH((linear_4bit_kernel<T, Lanes, Rows, Nested, false>), grid, kThreads, 0, stream, p);
  }
  return launched();
}

}  // namespace

const char* linear_4bit(const void* x, DType dtype, Weight4 weight, const void* bias, int64_t m, int64_t n,
                        int64_t k, void* y, void* stream) {
  if (m > kFewRows) return "linear_4bit takes at most 16 rows";
  return with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const Linear4<T> p = {static_cast<const T*>(x),
                          weight,
                          levels_of(weight.format),
                          log2_of(weight.blocksize),
                          static_cast<const T*>(bias),
                          m,
                          n,
                          k,
                          static_cast<T*>(y)};
    return with_lanes([&](auto lanes) {
      return with_nested(weight.absmax, [&](auto nested) {
        constexpr int kLanes = decltype(lanes)::value;
        constexpr bool kNested = decltype(nested)::value;
        return m == 1 ? launch<T, kLanes, 1, kNested>(p, stream) : launch<T, kLanes, 4, kNested>(p, stream);
      });
    });
  });
}

}  // namespace halfbyte::gpu
