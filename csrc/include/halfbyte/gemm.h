// gemm.h: the seam to the CUDA-only matrix kernels of ../../cuda.  As in gpu.h: launchers enqueue on `stream` of the
// current device and return nullptr or an error text; none prints, throws, waits or allocates.
#pragma once
#include "halfbyte/types.h"

namespace halfbyte::cuda {

// y [m, n] = x [m, k] . dequantized weight [n, k]^T + bias.  x, y and bias are float16 or bfloat16; every pointer is
// aligned to 16 bytes; k is a multiple of 256 and of the block size, which is 64 or more; m, n, k < 2^31.
struct Linear4 {
  Weight4 weight;
  const void *x, *bias;  // bias may be null
  void* y;
  DType dtype;
  int64_t m, n, k;
  bool overlap;  // start before the previous kernel of the stream has ended, to wait for it before x is read
  void* stream;
};

// m <= 16.  Tiles of 16 rows of the weight at a time, and stages in flight; the choices are in linear4_stream.cu.
const char* linear_4bit_stream(const Linear4& a, int tiles, int depth);

// Any m.  Columns of a tile (rows of x), 64-row groups of the weight, groups that take turns along k, log2 of the
// blocks that share k; the choices are in linear4_tile.cu.
const char* linear_4bit_tile(const Linear4& a, int columns, int groups, int turns, int log_splits);

// Many m.  Columns of a tile, 128 or 256; blocks that share k, 1 to 3.
const char* linear_4bit_wide(const Linear4& a, int columns, int splits);

}  // namespace halfbyte::cuda
