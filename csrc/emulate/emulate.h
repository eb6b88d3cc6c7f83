// emulate.h: CUDA's execution model on the CPU, for tests: it proves arithmetic, indexing and the binding, not
// speed and not memory ordering, and it finds no data races.
//
// Every thread of a block is a fiber with its own stack; the blocks of a grid run one after another, so shared
// memory is static memory.  A barrier yields until every live fiber of its range (the block, or a warp of
// HALFBYTE_WARP) has arrived; a fiber that returned holds nobody up.  Every live lane of a warp must take part in
// a shuffle.  A launch runs the whole grid at once, under a mutex: the binding has released Python's lock.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <functional>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace halfbyte::emulate {

struct Place {
  dim3 thread, block, block_size, grid_size;
};
extern Place place;  // of the fiber that runs

void launch(dim3 grid, dim3 block, size_t shared_bytes, void* stream, const std::function<void()>& kernel);
void block_barrier();
uint64_t exchange_xor(uint64_t value, int mask);

template <class T>
T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) <= 8);
  uint64_t raw = 0;
  memcpy(&raw, &value, sizeof value);
  raw = exchange_xor(raw, mask);
  memcpy(&value, &raw, sizeof value);
  return value;
}

inline float half_to_float(uint16_t bits) {
  _Float16 half;
  memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}
inline uint16_t float_to_half(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}

}  // namespace halfbyte::emulate

#define threadIdx (halfbyte::emulate::place.thread)
#define blockIdx (halfbyte::emulate::place.block)
#define blockDim (halfbyte::emulate::place.block_size)
#define gridDim (halfbyte::emulate::place.grid_size)
#define __syncthreads() halfbyte::emulate::block_barrier()

// -- the runtime's names, as far as portable.cuh uses them -------------------------------------------------------

using gpuError_t = int;
using gpuStream_t = void*;
constexpr gpuError_t gpuSuccess = 0;
constexpr int gpuMultiprocessors = 0, gpuLanes = 1;
inline gpuError_t gpuGetLastError() { return gpuSuccess; }
inline const char* gpuGetErrorString(gpuError_t) { return "the emulation failed"; }
inline gpuError_t gpuGetDeviceCount(int* count) { return *count = 1, gpuSuccess; }
inline gpuError_t gpuGetDevice(int* device) { return *device = 0, gpuSuccess; }
inline gpuError_t gpuSetDevice(int) { return gpuSuccess; }
inline gpuError_t gpuDeviceGetAttribute(int* value, int what, int) {
  *value = what == gpuLanes ? HALFBYTE_WARP : 1;  // one multiprocessor: grids that stride do stride
  return gpuSuccess;
}
inline gpuError_t gpuMallocManaged(void** p, size_t bytes) {
  *p = malloc(bytes);
  return *p == nullptr;
}
inline gpuError_t gpuFree(void* p) { return free(p), gpuSuccess; }
inline gpuError_t gpuMemPrefetchAsync(const void*, size_t, int, gpuStream_t) { return gpuSuccess; }
inline gpuError_t gpuMemsetAsync(void* p, int value, size_t bytes, gpuStream_t) {
  memset(p, value, bytes);
  return gpuSuccess;
}
