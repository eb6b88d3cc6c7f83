// gpu.h: the seam between host and GPU compilers: the portable kernels of CUDA, ROCm and the emulation.
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

}  // namespace halfbyte::gpu
