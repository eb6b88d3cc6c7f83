// gpu.h: the seam between host and GPU compilers: the portable kernels of CUDA, ROCm, SYCL and the emulation.
//
// Every launcher enqueues on `stream` of the current device and returns nullptr or an error text; none prints,
// throws, waits or allocates, so all can be captured in a graph.  Sizes count elements and are 64 bits wide;
// the adapters (core/halfbyte/native_gpu.py) never pass 0.  Tensors are contiguous; what they must be aligned
// to is said where it is more than their elements.
#pragma once
#include "halfbyte/types.h"

namespace halfbyte::gpu {

// -- the runtime -----------------------------------------------------------------------------------------------

// Devices that the driver shows; 0 where there is none, and then `error` is why.
int device_count(const char** error);

// The current device of this thread; -1 where there is none.
int current_device();
const char* set_device(int device);

// The stream of what this thread launches next.  With SYCL that is what says which device it is for.
void use_stream(void* stream);

// Memory that host and device reach at one address, for paged states.  Only managed_prefetch enqueues.
const char* managed_alloc(int64_t size, void** data);
const char* managed_free(void* data);
const char* managed_prefetch(const void* data, int64_t size, void* stream);

// What the module was built for, as the build named it: "75-real;90a-real;120", "gfx942;gfx1100", "".
const char* archs();

// -- 4 bit -----------------------------------------------------------------------------------------------------

// x aligned to 16 bytes, packed to 8.  packed has (count + 1) / 2 bytes, absmax one value per block.
const char* quantize_4bit(const void* x, DType dtype, int64_t count, Format format, int64_t blocksize,
                          uint8_t* packed, float* absmax, void* stream);

// Part of a weight: rows [row, row + rows) and columns [column, column + columns) of a matrix with `k` columns.
// A flat tensor is one row.  out [rows, columns], aligned to 16 bytes.
struct Part {
  int64_t k, row, rows, column, columns;
};
const char* dequantize_4bit(Weight4 weight, Part part, void* out, DType dtype, void* stream);

// y = x @ weight^T + bias for few rows: m at most kFewRows.  x [m, k] aligned to 16 bytes; bias may be nullptr.
constexpr int64_t kFewRows = 16;
const char* linear_4bit(const void* x, DType dtype, Weight4 weight, const void* bias, int64_t m, int64_t n,
                        int64_t k, void* y, void* stream);

// -- 8 bit -----------------------------------------------------------------------------------------------------

// x and codes aligned to 16 bytes; codebook: 256 ascending values.
const char* quantize_8bit(const void* x, DType dtype, int64_t count, const float* codebook, int64_t blocksize,
                          uint8_t* codes, float* absmax, void* stream);

// codes and out aligned to 16 bytes.
const char* dequantize_8bit(const uint8_t* codes, const float* absmax, const float* codebook,
                            int64_t blocksize, void* out, DType dtype, int64_t count, void* stream);

// -- int8 ------------------------------------------------------------------------------------------------------

// outlier_columns: a byte per column, 1 where a value of magnitude >= threshold > 0 stands in it.  Where `zero`,
// these columns are 0 in q.
const char* quantize_int8_rows(const void* x, DType dtype, int64_t rows, int64_t k, float threshold,
                               bool zero, int8_t* q, float* absmax, uint8_t* outlier_columns, void* stream);

// q is int32 where `wide`, else int8; col_absmax and bias (fp32) may be nullptr.
const char* dequantize_int8(const void* q, bool wide, const float* row_absmax, const float* col_absmax,
                            const float* bias, void* out, DType dtype, int64_t rows, int64_t n, void* stream);

const char* matmul_int8(const int8_t* a, const int8_t* b, int64_t m, int64_t n, int64_t k, int32_t* out,
                        void* stream);

// The columns that are flagged, ascending: list[0 .. *size).  `list` has room for k.
const char* list_columns(const uint8_t* flags, int64_t k, int32_t* list, int32_t* size, void* stream);

// LLM.int8() of x that is quantized already (q without its outlier columns zeroed): the product of the other
// columns in integers, of the listed ones in fp32.  Without outliers `list` is nullptr.
struct Quantized {
  const int8_t* q;
  const float* absmax;
  const int32_t* list;
  const int32_t* size;
};
const char* linear_int8_exact(const void* x, DType dtype, Quantized quantized, const int8_t* weight,
                              const float* weight_absmax, const void* bias, int64_t m, int64_t n, int64_t k,
                              void* y, void* stream);

// The same from the integer sums [m, n] of q, whose outlier columns are zero; q itself is not read.  n is even.
const char* scale_int8(const void* x, DType dtype, Quantized quantized, const int32_t* sums,
                       const int8_t* weight, const float* weight_absmax, const void* bias, int64_t m,
                       int64_t n, int64_t k, void* y, void* stream);

// x as it is, m at most kFewRows; x aligned to 16 bytes.
const char* linear_int8_w8a16(const void* x, DType dtype, const int8_t* weight, const float* weight_absmax,
                              const void* bias, int64_t m, int64_t n, int64_t k, void* y, void* stream);

}  // namespace halfbyte::gpu
