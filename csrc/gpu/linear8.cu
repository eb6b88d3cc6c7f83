// linear8.cu: products with an int8 weight [n, k]: int8 x int8 -> int32, LLM.int8() with its outlier columns, and
// 16- or 32-bit activations as they are.
//
// Work      for few rows one warp per output column and up to 4 rows: 16 bytes of the weight per lane and step,
//           sums over the lanes in fixed order.  For more, blocks of 64 x 64 outputs, 16 per thread, over tiles
//           of 64 in shared memory.  dp4a where there is one.  Rows that are no multiple of 16 (in tiles 4)
//           bytes are read byte by byte.
//           Outlier columns come as a list with a count on the device: their integer products are taken out
//           again, and the fp32 products with x itself added.
// Limits    x aligned to 16 bytes in w8a16.
// Agrees    matmul_int8 exactly; the layers within the op's tolerance: sums in fp32, rounded once.
#include "linear8.cuh"

namespace halfbyte::gpu {
namespace {

constexpr int kThreads = 256;

// The share of some outlier columns: what to take from the integer sum, and what to add to the scaled one.
template <class T>
HALFBYTE_DEVICE void add_outliers(const Product<T>& p, int64_t m, int64_t n, int first, int step,
                                  int32_t& whole, float& exact) {
  const int size = *p.size;
  const float scale = p.weight_absmax[n];
  for (int i = first; i < size; i += step) {
    const int64_t column = p.list[i];
    const int32_t w = p.weight[n * p.k + column];
    whole -= p.a[m * p.k + column] * w;
    exact = fmaf(widen(p.x[m * p.k + column]), static_cast<float>(w) * scale * kPer127, exact);
  }
}

template <class T>
HALFBYTE_DEVICE void finish(const Product<T>& p, int64_t m, int64_t n, int32_t whole, float exact) {
  if constexpr (std::is_same_v<T, int32_t>) {
    p.y[m * p.n + n] = whole;
  } else {
    p.y[m * p.n + n] = narrow<T>(scaled(p, m, n, whole, exact));
  }
}

// -- few rows ----------------------------------------------------------------------------------------------------

template <class T, int Lanes, int Rows>
__global__ void __launch_bounds__(kThreads) few_exact_kernel(Product<T> p, bool whole_words) {
  const int lane = static_cast<int>(threadIdx.x) % Lanes, warps = kThreads / Lanes;
  const int64_t m0 = int64_t{blockIdx.y} * Rows;
  const int64_t step = int64_t{gridDim.x} * warps;
  for (int64_t n = int64_t{blockIdx.x} * warps + threadIdx.x / Lanes; n < p.n; n += step) {
    int32_t sum[Rows] = {};
    if (whole_words) {
      for (int64_t k = lane * 16; k < p.k; k += Lanes * 16) {
        const Words<16> w = load<16>(p.weight + n * p.k + k);
        HALFBYTE_UNROLL
        for (int r = 0; r < Rows; ++r) {
          if (m0 + r >= p.m) break;
          const Words<16> a = load<16>(p.a + (m0 + r) * p.k + k);
          HALFBYTE_UNROLL
          for (int i = 0; i < 4; ++i) sum[r] = dot4(a.w[i], w.w[i], sum[r]);
        }
      }
    } else {
      for (int64_t k = lane; k < p.k; k += Lanes) {
        const int32_t w = p.weight[n * p.k + k];
        HALFBYTE_UNROLL
        for (int r = 0; r < Rows; ++r) {
          if (m0 + r < p.m) sum[r] += p.a[(m0 + r) * p.k + k] * w;
        }
      }
    }
    HALFBYTE_UNROLL
    for (int r = 0; r < Rows; ++r) {
      float exact = 0.0f;
      if constexpr (!std::is_same_v<T, int32_t>) {
        if (p.list != nullptr && m0 + r < p.m) add_outliers(p, m0 + r, n, lane, Lanes, sum[r], exact);
        exact = warp_sum<Lanes>(exact);
      }
      const int32_t total = warp_sum<Lanes>(sum[r]);
      if (lane == 0 && m0 + r < p.m) finish(p, m0 + r, n, total, exact);
    }
  }
}

template <class T, int Lanes, int Rows>
__global__ void __launch_bounds__(kThreads) few_w8a16_kernel(Product<T> p, bool whole_words) {
  const int lane = static_cast<int>(threadIdx.x) % Lanes, warps = kThreads / Lanes;
  const int64_t m0 = int64_t{blockIdx.y} * Rows;
  const int64_t step = int64_t{gridDim.x} * warps;
  for (int64_t n = int64_t{blockIdx.x} * warps + threadIdx.x / Lanes; n < p.n; n += step) {
    float sum[Rows] = {};
    if (whole_words) {
      for (int64_t k = lane * 16; k < p.k; k += Lanes * 16) {
        const Words<16> w = load<16>(p.weight + n * p.k + k);
        HALFBYTE_UNROLL
        for (int half = 0; half < 2; ++half) {
          float weights[8];
          HALFBYTE_UNROLL
          for (int i = 0; i < 8; ++i) weights[i] = widen_byte(w.w[half * 2 + i / 4], i % 4);
          HALFBYTE_UNROLL
          for (int r = 0; r < Rows; ++r) {
            if (m0 + r >= p.m) break;
            const T* at = p.x + (m0 + r) * p.k + k + half * 8;
            float v[8];
            HALFBYTE_UNROLL
            for (int i = 0; i < 8; i += 16 / sizeof(T)) widen_all<T>(load<16>(at + i), v + i);
            HALFBYTE_UNROLL
            for (int i = 0; i < 8; ++i) sum[r] = fmaf(weights[i], v[i], sum[r]);
          }
        }
      }
    } else {
      for (int64_t k = lane; k < p.k; k += Lanes) {
        const auto w = static_cast<float>(p.weight[n * p.k + k]);
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
        const float scaled = total * (p.weight_absmax[n] * kPer127);
        p.y[(m0 + r) * p.n + n] = narrow<T>(p.bias != nullptr ? scaled + widen(p.bias[n]) : scaled);
      }
    }
  }
}

template <int Rows>
dim3 few_grid(int64_t m, int64_t n, int lanes) {
  return dim3(grid_for(ceil_div(n, kThreads / lanes), 32), static_cast<unsigned>(ceil_div(m, Rows)));
}

template <class T>
const char* few_exact(const Product<T>& p, void* stream) {
  const bool whole = p.k % 16 == 0 && aligned(p.a, 16) && aligned(p.weight, 16);
  return with_lanes([&](auto lanes) {
    constexpr int kLanes = decltype(lanes)::value;
    if (p.m == 1) {
      HALFBYTE_LAUNCH((few_exact_kernel<T, kLanes, 1>), few_grid<1>(p.m, p.n, kLanes), kThreads, 0, stream, p,
                      whole);
    } else {
      HALFBYTE_LAUNCH((few_exact_kernel<T, kLanes, 4>), few_grid<4>(p.m, p.n, kLanes), kThreads, 0, stream, p,
                      whole);
    }
    return launched();
  });
}

// -- many rows ---------------------------------------------------------------------------------------------------

constexpr int kTile = 64;           // rows, columns and bytes of k
constexpr int kWords = kTile / 4;   // of a row of a tile
constexpr int kPitch = kWords + 1;  // so that a column of words lies in different banks

// 64 rows of 64 bytes from `first` on; zeros outside.
HALFBYTE_DEVICE void read_tile(uint32_t* tile, const int8_t* from, int64_t rows, int64_t k, int64_t first_row,
                               int64_t first, bool whole_words) {
  for (unsigned i = threadIdx.x; i < kTile * kWords; i += kThreads) {
    const int64_t row = first_row + i / kWords, at = first + i % kWords * 4;
    uint32_t word = 0;
    if (row < rows) {
      if (whole_words) {
        if (at < k) word = load<4>(from + row * k + at).w[0];
      } else {
        for (int j = 0; j < 4; ++j) {
          if (at + j < k)
            word |= static_cast<uint32_t>(static_cast<uint8_t>(from[row * k + at + j])) << 8 * j;
        }
      }
    }
    tile[i / kWords * kPitch + i % kWords] = word;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) tiled_kernel(Product<T> p, bool whole_words) {
  __shared__ uint32_t a[kTile * kPitch];
  __shared__ uint32_t b[kTile * kPitch];
  const int64_t m0 = int64_t{blockIdx.x} * kTile, n0 = int64_t{blockIdx.y} * kTile;
  const int tm = static_cast<int>(threadIdx.x) / 16, tn = static_cast<int>(threadIdx.x) % 16;
  int32_t sum[4][4] = {};
  for (int64_t k = 0; k < p.k; k += kTile) {
    __syncthreads();
    read_tile(a, p.a, p.m, p.k, m0, k, whole_words);
    read_tile(b, p.weight, p.n, p.k, n0, k, whole_words);
    __syncthreads();
    for (int word = 0; word < kWords; ++word) {
      uint32_t of_a[4], of_b[4];
      HALFBYTE_UNROLL
      for (int i = 0; i < 4; ++i) of_a[i] = a[(tm + 16 * i) * kPitch + word];
      HALFBYTE_UNROLL
      for (int j = 0; j < 4; ++j) of_b[j] = b[(tn + 16 * j) * kPitch + word];
      HALFBYTE_UNROLL
      for (int i = 0; i < 4; ++i) {
        HALFBYTE_UNROLL
        for (int j = 0; j < 4; ++j) sum[i][j] = dot4(of_a[i], of_b[j], sum[i][j]);
      }
    }
  }
  HALFBYTE_UNROLL
  for (int i = 0; i < 4; ++i) {
    HALFBYTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int64_t m = m0 + tm + 16 * i, n = n0 + tn + 16 * j;
      if (m >= p.m || n >= p.n) continue;
      float exact = 0.0f;
      if constexpr (!std::is_same_v<T, int32_t>) {
        if (p.list != nullptr) add_outliers(p, m, n, 0, 1, sum[i][j], exact);
      }
      finish(p, m, n, sum[i][j], exact);
    }
  }
}

template <class T>
const char* tiled(const Product<T>& p, void* stream) {
  const bool whole = p.k % 4 == 0 && aligned(p.a, 4) && aligned(p.weight, 4);
  const int64_t down = ceil_div(p.m, kTile), across = ceil_div(p.n, kTile);
  if (across > 65535) return "an int8 product takes at most 4194240 output columns";
  const dim3 grid(static_cast<unsigned>(down), static_cast<unsigned>(across));
  HALFBYTE_LAUNCH((tiled_kernel<T>), grid, kThreads, 0, stream, p, whole);
  return launched();
}

}  // namespace

const char* matmul_int8(const int8_t* a, const int8_t* b, int64_t m, int64_t n, int64_t k, int32_t* out,
                        void* stream) {
  Product<int32_t> p = {};
  p.a = a;
  p.weight = b;
  p.m = m;
  p.n = n;
  p.k = k;
  p.y = out;
  return m <= kFewRows ? few_exact(p, stream) : tiled(p, stream);
}

const char* linear_int8_exact(const void* x, DType dtype, Quantized quantized, const int8_t* weight,
                              const float* weight_absmax, const void* bias, int64_t m, int64_t n, int64_t k,
                              void* y, void* stream) {
  return with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const Product<T> p = {quantized.q,
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
    return m <= kFewRows ? few_exact(p, stream) : tiled(p, stream);
  });
}

const char* linear_int8_w8a16(const void* x, DType dtype, const int8_t* weight, const float* weight_absmax,
                              const void* bias, int64_t m, int64_t n, int64_t k, void* y, void* stream) {
  if (m > kFewRows) return "linear_int8_w8a16 takes at most 16 rows";
  return with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    Product<T> p = {};
    p.x = static_cast<const T*>(x);
    p.weight = weight;
    p.m = m;
    p.n = n;
    p.k = k;
    p.weight_absmax = weight_absmax;
    p.bias = static_cast<const T*>(bias);
    p.y = static_cast<T*>(y);
    const bool whole = k % 16 == 0 && aligned(weight, 16);
    return with_lanes([&](auto lanes) {
      constexpr int kLanes = decltype(lanes)::value;
      if (m == 1) {
        HALFBYTE_LAUNCH((few_w8a16_kernel<T, kLanes, 1>), few_grid<1>(m, n, kLanes), kThreads, 0, stream, p,
                        whole);
      } else {
        HALFBYTE_LAUNCH((few_w8a16_kernel<T, kLanes, 4>), few_grid<4>(m, n, kLanes), kThreads, 0, stream, p,
                        whole);
      }
      return launched();
    });
  });
}

}  // namespace halfbyte::gpu
