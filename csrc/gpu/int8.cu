// int8.cu: LLM.int8() apart from products: rows to int8 and back, and the list of outlier columns.
//
// Work      quantize: a block per row, which stays in registers between the maximum and the codes (up to 16384
//           values of 16 bits, 8192 of fp32); longer or unaligned rows are read twice.  Outliers of any row flag
//           their column with a byte, and a second kernel clears flagged columns: nothing waits for the host.
//           dequantize: 16 bytes of output per thread.
// Bound by  memory: quantize reads sizeof(T) and writes 1 byte per value.
// Agrees    bit for bit with the reference: q = rint(x * (127 / absmax)), ties to even; products one by one.
#include "blockwise.cuh"
#include "halfbyte/gpu.h"
#include "rows8.cuh"

namespace halfbyte::gpu {
namespace {

constexpr int kThreads = 256;

// The largest magnitude below the threshold; marks the columns of others.
HALFBYTE_DEVICE float ordinary(float x, float threshold, uint8_t* flag) {
  const float size = fabsf(x);
  if (threshold > 0.0f && size >= threshold) {
    *flag = 1;
    return 0.0f;
  }
  return size;
}

template <class T, int Vectors>
__global__ void __launch_bounds__(kThreads)
    quantize_rows_kernel(const T* __restrict__ x, int64_t rows, int64_t k, float threshold,
                         int8_t* __restrict__ q, float* __restrict__ absmax, uint8_t* __restrict__ flags) {
  constexpr int kValues = 16 / sizeof(T);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* from = x + row * k;
    float v[Vectors][kValues];
    float most = 0.0f;
    HALFBYTE_UNROLL
    for (int i = 0; i < Vectors; ++i) {
      const int64_t at = (int64_t{i} * kThreads + threadIdx.x) * kValues;
      if (at < k) {
        widen_all<T>(load<16>(from + at), v[i]);
      } else {
        HALFBYTE_UNROLL
        for (int j = 0; j < kValues; ++j) v[i][j] = 0.0f;
      }
    }
    HALFBYTE_UNROLL
    for (int i = 0; i < Vectors; ++i) {
      const int64_t at = (int64_t{i} * kThreads + threadIdx.x) * kValues;
      HALFBYTE_UNROLL
      for (int j = 0; j < kValues; ++j) most = fmaxf(most, ordinary(v[i][j], threshold, flags + at + j));
    }
    most = neighbours_max<true>(most, kThreads);
    if (threadIdx.x == 0) absmax[row] = most;
    const float scale = row_scale(most);
    HALFBYTE_UNROLL
    for (int i = 0; i < Vectors; ++i) {
      const int64_t at = (int64_t{i} * kThreads + threadIdx.x) * kValues;
      if (at >= k) break;
      Words<kValues> words;
      HALFBYTE_UNROLL
      for (int j = 0; j < kValues; j += 4) {
        words.w[j / 4] = last_bytes(code_of(v[i][j] * scale), code_of(v[i][j + 1] * scale),
                                    code_of(v[i][j + 2] * scale), code_of(v[i][j + 3] * scale));
      }
      store<kValues>(q + row * k + at, words);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize_any_rows_kernel(const T* __restrict__ x, int64_t rows, int64_t k, float threshold,
                             int8_t* __restrict__ q, float* __restrict__ absmax,
                             uint8_t* __restrict__ flags) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* from = x + row * k;
    float most = 0.0f;
    for (int64_t i = threadIdx.x; i < k; i += kThreads) {
      most = fmaxf(most, ordinary(widen(from[i]), threshold, flags + i));
    }
    most = neighbours_max<true>(most, kThreads);
    if (threadIdx.x == 0) absmax[row] = most;
    const float scale = row_scale(most);
    for (int64_t i = threadIdx.x; i < k; i += kThreads)
      q[row * k + i] = static_cast<int8_t>(code_of(widen(from[i]) * scale));
  }
}

__global__ void __launch_bounds__(kThreads)
    clear_columns_kernel(const uint8_t* __restrict__ flags, int64_t rows, int64_t k, int8_t* __restrict__ q) {
  const int64_t column = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (column >= k || flags[column] == 0) return;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) q[row * k + column] = 0;
}

// One block: every thread counts its share of the columns, sums of shares place them.
__global__ void __launch_bounds__(1024)
    list_columns_kernel(const uint8_t* __restrict__ flags, int64_t k, int32_t* __restrict__ list,
                        int32_t* __restrict__ size) {
  __shared__ int32_t sums[1024];
  const auto thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t share = (k + threads - 1) / threads;
  const int64_t first = thread * share, end = first + share < k ? first + share : k;
  int32_t own = 0;
  for (int64_t i = first; i < end; ++i) own += flags[i] != 0;
  sums[thread] = own;
  for (int reach = 1; reach < threads; reach *= 2) {
    __syncthreads();
    const int32_t before = thread >= reach ? sums[thread - reach] : 0;
    __syncthreads();
    sums[thread] += before;
  }
  int32_t at = sums[thread] - own;
  for (int64_t i = first; i < end; ++i) {
    if (flags[i] != 0) list[at++] = static_cast<int32_t>(i);
  }
  if (thread == threads - 1) *size = sums[thread];
}

struct Scales {
  const float* row;
  const float* column;
  const float* bias;
};

HALFBYTE_DEVICE float undo(float q, float row, const Scales& scales, int64_t column) {
  float value;
  if (scales.column == nullptr) {
    value = q * row * (1.0f / 127.0f);
  } else {
    value = q * (row * scales.column[column]) * static_cast<float>(1.0 / (127.0 * 127.0));
  }
  return scales.bias != nullptr ? value + scales.bias[column] : value;
}

template <class T, class Q, int Values>
__global__ void __launch_bounds__(kThreads)
    dequantize_int8_kernel(const Q* __restrict__ q, Scales scales, T* __restrict__ out, int64_t rows,
                           int64_t n) {
  const int64_t per_row = n / Values, step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < rows * per_row; i += step) {
    const int64_t row = quotient(i, per_row), column = (i - row * per_row) * Values;
    const float scale = scales.row[row];
    if constexpr (Values == 1) {
      out[i] = narrow<T>(undo(static_cast<float>(q[i]), scale, scales, column));
    } else {
      float v[Values];
      if constexpr (sizeof(Q) == 1) {
        const Words<Values> words = load<Values>(q + i * Values);
        HALFBYTE_UNROLL
        for (int j = 0; j < Values; ++j) v[j] = widen_byte(words.w[j / 4], j % 4);
      } else {
        HALFBYTE_UNROLL
        for (int j = 0; j < Values; j += 4) {
          const Words<16> words = load<16>(q + i * Values + j);
          HALFBYTE_UNROLL
          for (int l = 0; l < 4; ++l) v[j + l] = static_cast<float>(static_cast<int32_t>(words.w[l]));
        }
      }
      HALFBYTE_UNROLL
      for (int j = 0; j < Values; ++j) v[j] = undo(v[j], scale, scales, column + j);
      store<16>(out + i * Values, narrow_all<T>(v));
    }
  }
}

template <class T, int Vectors>
void quantize_rows(const T* x, int64_t rows, int64_t k, float threshold, int8_t* q, float* absmax,
                   uint8_t* flags, void* stream) {
  HALFBYTE_LAUNCH((quantize_rows_kernel<T, Vectors>), grid_for(rows, 1024), kThreads, 0, stream, x, rows, k,
                  threshold, q, absmax, flags);
}

template <class T, class Q>
const char* dequantize(const Q* q, const Scales& scales, T* out, int64_t rows, int64_t n, void* stream) {
  constexpr int kValues = 16 / sizeof(T);
  if (n % kValues == 0 && aligned(q, sizeof(Q) == 1 ? kValues : 16)) {
    const unsigned grid = grid_for(ceil_div(rows * n / kValues, kThreads), 32);
    HALFBYTE_LAUNCH((dequantize_int8_kernel<T, Q, kValues>), grid, kThreads, 0, stream, q, scales, out, rows,
                    n);
  } else {
    const unsigned grid = grid_for(ceil_div(rows * n, kThreads), 32);
    HALFBYTE_LAUNCH((dequantize_int8_kernel<T, Q, 1>), grid, kThreads, 0, stream, q, scales, out, rows, n);
  }
  return launched();
}

}  // namespace

const char* quantize_int8_rows(const void* x, DType dtype, int64_t rows, int64_t k, float threshold,
                               bool zero, int8_t* q, float* absmax, uint8_t* outlier_columns, void* stream) {
  const gpuError_t status =
      gpuMemsetAsync(outlier_columns, 0, static_cast<size_t>(k), static_cast<gpuStream_t>(stream));
  if (status != gpuSuccess) return gpuGetErrorString(status);
  const char* error = with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const auto* from = static_cast<const T*>(x);
    const int64_t vectors = ceil_div(k, kThreads * 16 / static_cast<int64_t>(sizeof(T)));
    if (k % (16 / static_cast<int64_t>(sizeof(T))) != 0 || vectors > 8) {
      HALFBYTE_LAUNCH((quantize_any_rows_kernel<T>), grid_for(rows, 8), kThreads, 0, stream, from, rows, k,
                      threshold, q, absmax, outlier_columns);
    } else if (vectors == 1) {
      quantize_rows<T, 1>(from, rows, k, threshold, q, absmax, outlier_columns, stream);
    } else if (vectors == 2) {
      quantize_rows<T, 2>(from, rows, k, threshold, q, absmax, outlier_columns, stream);
    } else if (vectors <= 4) {
      quantize_rows<T, 4>(from, rows, k, threshold, q, absmax, outlier_columns, stream);
    } else {
      quantize_rows<T, 8>(from, rows, k, threshold, q, absmax, outlier_columns, stream);
    }
    return launched();
  });
  if (error != nullptr || !zero || !(threshold > 0.0f)) return error;
  const dim3 grid(static_cast<unsigned>(ceil_div(k, kThreads)), static_cast<unsigned>(rows < 64 ? rows : 64));
  HALFBYTE_LAUNCH((clear_columns_kernel), grid, kThreads, 0, stream, outlier_columns, rows, k, q);
  return launched();
}

const char* list_columns(const uint8_t* flags, int64_t k, int32_t* list, int32_t* size, void* stream) {
  HALFBYTE_LAUNCH((list_columns_kernel), 1, k < 1024 ? 128 : 1024, 0, stream, flags, k, list, size);
  return launched();
}

const char* dequantize_int8(const void* q, bool wide, const float* row_absmax, const float* col_absmax,
                            const float* bias, void* out, DType dtype, int64_t rows, int64_t n,
                            void* stream) {
  const Scales scales = {row_absmax, col_absmax, bias};
  return with_dtype(dtype, [&](auto type) {
    auto* to = static_cast<decltype(type)*>(out);
    return wide ? dequantize(static_cast<const int32_t*>(q), scales, to, rows, n, stream)
                : dequantize(static_cast<const int8_t*>(q), scales, to, rows, n, stream);
  });
}

}  // namespace halfbyte::gpu
