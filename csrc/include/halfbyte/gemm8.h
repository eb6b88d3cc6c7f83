// gemm8.h: the seam to LLM.int8() on the tensor cores of sm_90a, in ../../cuda.  As in gpu.h: launchers enqueue on
// `stream` of the current device and return nullptr or an error text; none prints, throws, waits or allocates.
#pragma once
#include "halfbyte/types.h"

namespace halfbyte::cuda {

// y [m, n] = x [m, k] . (weight [n, k] * weight_absmax / 127)^T + bias, as ops/int8.py has it in mode "exact".
// x, y and bias are float16 or bfloat16; bias may be null; x, weight and y are aligned to 16 bytes; k is a multiple of 16
// and at most kMostK8; m, n < 2^31.
struct Linear8 {
  const void* x;
  const int8_t* weight;
  const float* weight_absmax;
  const void* bias;
  void* y;
  DType dtype;
  int64_t m, n, k;
  float threshold;
  void* workspace;  // linear_int8_tensor_workspace(m, n, k, threshold) bytes, aligned to 16
  void* stream;
};
constexpr int64_t kMostK8 = 32768;

int64_t linear_int8_tensor_workspace(int64_t m, int64_t n, int64_t k, float threshold);

// The whole layer: the rows to int8, then the product.
const char* linear_int8_tensor(const Linear8& a);

// -- its parts -------------------------------------------------------------------------------------------------

// A workspace: rows of x in int8, outliers as zeros, and the largest magnitude of each row but for them.  Of each block
// of rows how many columns had outliers, and which: up to kNamed by number, else as bits.  Room for a list of all.
constexpr int kNamed = 7;
struct Rows8 {
  int8_t* q;
  float* absmax;
  uint16_t* named;  // [blocks][1 + kNamed]; null without a threshold
  uint8_t* masks;   // [blocks][pitch]
  int32_t *list, *count;
  // For more than kFewRows8 rows, else null: what the integers miss of x [m][room] and the weight [n][room] at the first
  // `room` outlier columns, in x's dtype, with zeros up to a multiple of 64.  Filled where there are more than kFewOutliers.
  void *x, *weight;
  int blocks, pitch, room;
};
constexpr int64_t kFewRows8 = 256;
constexpr int kFewOutliers = 8;
constexpr int kMostBlocks8 = 132;  // an H100's or H200's multiprocessors
Rows8 rows_of(const Linear8& a);

const char* quantize_rows(const Linear8& a, const Rows8& rows);
// Fills list, count, x and weight, where there is an x.
const char* collect_outliers(const Linear8& a, const Rows8& rows);
// For few rows of x: `columns` (16, 32, 64 or 128) at a time, k shared by 2^log_splits blocks, at most 8.
const char* linear_int8_few(const Linear8& a, const Rows8& rows, int columns, int log_splits);
// For many: tiles of 128 x `columns` (128 or 256) outputs.
const char* linear_int8_tile(const Linear8& a, const Rows8& rows, int columns);

}  // namespace halfbyte::cuda
