// portable.cuh: the one place where CUDA, HIP, SYCL and the emulation differ.
//
// Kernels are written once, with the names below.  Shuffles reach kGroup neighbouring lanes unless a kernel is a
// template over `Lanes`, which with_lanes() chooses from what the device says.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "halfbyte/types.h"

#if defined(HALFBYTE_EMULATE)
#include "emulate.h"
#elif defined(HALFBYTE_SYCL)
#include "xpu.h"
#elif defined(__HIP__)
#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

// -- runtime -----------------------------------------------------------------------------------------------------

#if defined(HALFBYTE_EMULATE)
#define HALFBYTE_LAUNCH(kernel, grid, block, smem, stream, ...) \
  halfbyte::emulate::launch(grid, block, smem, stream, [=] { (HALFBYTE_UNPAREN kernel)(__VA_ARGS__); })
#define HALFBYTE_SHFL_XOR(value, mask) halfbyte::emulate::shuffle_xor(value, mask)
#define HALFBYTE_UNROLL
#define HALFBYTE_ROLL
#elif defined(HALFBYTE_SYCL)  // xpu.h has them
#elif defined(__HIP__)
#define gpuStream_t hipStream_t
#define gpuError_t hipError_t
#define gpuSuccess hipSuccess
#define gpuGetLastError hipGetLastError
#define gpuGetErrorString hipGetErrorString
#define gpuGetDeviceCount hipGetDeviceCount
#define gpuGetDevice hipGetDevice
#define gpuSetDevice hipSetDevice
#define gpuMemsetAsync hipMemsetAsync
#define gpuMallocManaged hipMallocManaged
#define gpuFree hipFree
#define gpuMemPrefetchAsync hipMemPrefetchAsync
#define gpuDeviceGetAttribute hipDeviceGetAttribute
#define gpuMultiprocessors hipDeviceAttributeMultiprocessorCount
#define gpuLanes hipDeviceAttributeWarpSize
#define gpuOccupancy hipOccupancyMaxActiveBlocksPerMultiprocessor
#define HALFBYTE_LAUNCH(kernel, grid, block, smem, stream, ...) \
  HALFBYTE_UNPAREN kernel<<<grid, block, smem, static_cast<gpuStream_t>(stream)>>>(__VA_ARGS__)
#define HALFBYTE_SHFL_XOR(value, mask) __shfl_xor(value, mask)
#define HALFBYTE_UNROLL _Pragma("unroll")
#define HALFBYTE_ROLL _Pragma("unroll 1")  // for what is rare: code that is copied costs registers
#else
#define gpuStream_t cudaStream_t
#define gpuError_t cudaError_t
#define gpuSuccess cudaSuccess
#define gpuGetLastError cudaGetLastError
#define gpuGetErrorString cudaGetErrorString
#define gpuGetDeviceCount cudaGetDeviceCount
#define gpuGetDevice cudaGetDevice
#define gpuSetDevice cudaSetDevice
#define gpuMemsetAsync cudaMemsetAsync
#define gpuMallocManaged cudaMallocManaged
#define gpuFree cudaFree
#if CUDART_VERSION >= 13000
#define gpuMemPrefetchAsync(data, size, device, stream) \
  cudaMemPrefetchAsync(data, size, cudaMemLocation{cudaMemLocationTypeDevice, device}, 0, stream)
#else
#define gpuMemPrefetchAsync cudaMemPrefetchAsync
#endif
#define gpuDeviceGetAttribute cudaDeviceGetAttribute
#define gpuMultiprocessors cudaDevAttrMultiProcessorCount
#define gpuLanes cudaDevAttrWarpSize
#define gpuOccupancy cudaOccupancyMaxActiveBlocksPerMultiprocessor
#define HALFBYTE_LAUNCH(kernel, grid, block, smem, stream, ...) \
  HALFBYTE_UNPAREN kernel<<<grid, block, smem, static_cast<gpuStream_t>(stream)>>>(__VA_ARGS__)
#define HALFBYTE_SHFL_XOR(value, mask) __shfl_xor_sync(0xffffffffu, value, mask)
#define HALFBYTE_UNROLL _Pragma("unroll")
#define HALFBYTE_ROLL _Pragma("unroll 1")  // for what is rare: code that is copied costs registers
#endif
#define HALFBYTE_UNPAREN(...) __VA_ARGS__  // a kernel with template arguments is given in parentheses

#define HALFBYTE_DEVICE __device__ __forceinline__
#if defined(HALFBYTE_EMULATE) || defined(HALFBYTE_SYCL) || defined(__HIP__)
#define HALFBYTE_PLAIN  // C++ in place of CUDA's instructions
#endif

namespace halfbyte::gpu {

// What the launch just made came to.
inline const char* launched() {
  const gpuError_t error = gpuGetLastError();
  return error == gpuSuccess ? nullptr : gpuGetErrorString(error);
}

// Multiprocessors of the current device: how many blocks a grid that loops should have is counted in them.
inline int multiprocessors() {
  int device = 0, count = 0;
  if (gpuGetDevice(&device) != gpuSuccess) return 1;
  if (gpuDeviceGetAttribute(&count, gpuMultiprocessors, device) != gpuSuccess || count < 1) return 1;
  return count;
}

// Blocks for a kernel that strides over `tiles` with at most `each` blocks per multiprocessor.
inline unsigned grid_for(int64_t tiles, int each) {
  const int64_t most = static_cast<int64_t>(multiprocessors()) * each;
  return static_cast<unsigned>(tiles < most ? tiles : most);
}

// How many blocks of a kernel a multiprocessor has room for.  One that loops should have no more: they would begin when
// the others have ended.
template <class Kernel>
int resident(Kernel* kernel, int threads) {
#if defined(HALFBYTE_EMULATE) || defined(HALFBYTE_SYCL)
  static_cast<void>(kernel);
  return 2048 / threads;
#else
  int blocks = 0;
  if (gpuOccupancy(&blocks, kernel, threads, 0) == gpuSuccess && blocks > 0) return blocks;
  static_cast<void>(gpuGetLastError());  // a launch would tell it as its own
  return 1;
#endif
}

#if !defined(HALFBYTE_PLAIN)
// Whether a kernel may have `bytes` of dynamic shared memory on the current device, beside what it declares.
template <class Kernel>
bool allowed(Kernel* kernel, int bytes) {
  cudaFuncAttributes has;
  int device = 0, most = 0;
  if (cudaGetDevice(&device) == cudaSuccess && cudaFuncGetAttributes(&has, kernel) == cudaSuccess &&
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
      static_cast<int>(has.sharedSizeBytes) + bytes <= most &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess) {
    return true;
  }
  static_cast<void>(cudaGetLastError());  // a launch would tell it as its own
  return false;
}
#endif

// Lanes that a shuffle reaches, on every GPU: 32.  With SYCL the size of sub-groups, for which kernels are compiled
// when they are first run; launchers ask for it, kGroup is a kernel's.
#if defined(HALFBYTE_SYCL)
constexpr unsigned kGroup = HALFBYTE_LANES;
inline unsigned group_lanes() {
  int lanes = 0;
  return gpuDeviceGetAttribute(&lanes, gpuLanes, 0) == gpuSuccess ? static_cast<unsigned>(lanes) : kGroup;
}
#else
constexpr unsigned kGroup = 32;
inline unsigned group_lanes() { return kGroup; }
#endif

template <int N>
using Int = std::integral_constant<int, N>;

// f(Int<lanes>): the lanes in lockstep of the current device, 16 (SYCL), 32 or 64.
template <class Function>
const char* with_lanes(const Function& f) {
#if defined(HALFBYTE_EMULATE)
  return f(Int<HALFBYTE_WARP>());
#elif defined(HALFBYTE_SYCL)
  return group_lanes() == 16 ? f(Int<16>()) : f(Int<32>());
#elif defined(__HIP__)
  int device = 0, lanes = 0;
  if (gpuGetDevice(&device) != gpuSuccess) return gpuGetErrorString(gpuGetLastError());
  if (gpuDeviceGetAttribute(&lanes, gpuLanes, device) != gpuSuccess)
    return gpuGetErrorString(gpuGetLastError());
  return lanes == 64 ? f(Int<64>()) : f(Int<32>());
#else
  return f(Int<32>());
#endif
}

// -- bits and numbers --------------------------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

HALFBYTE_DEVICE float as_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

HALFBYTE_DEVICE uint32_t as_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

HALFBYTE_DEVICE float widen(float x) { return x; }
HALFBYTE_DEVICE float widen(BFloat x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
HALFBYTE_DEVICE float widen(Half x) {
#if defined(HALFBYTE_EMULATE)
  return emulate::half_to_float(x.bits);
#elif defined(HALFBYTE_SYCL)
  return xpu::half_to_float(x.bits);
#else
  return __half2float(__ushort_as_half(x.bits));
#endif
}

// To nearest, ties to even.
template <class T>
HALFBYTE_DEVICE T narrow(float x);
template <>
HALFBYTE_DEVICE float narrow<float>(float x) {
  return x;
}
template <>
HALFBYTE_DEVICE Half narrow<Half>(float x) {
#if defined(HALFBYTE_EMULATE)
  return {emulate::float_to_half(x)};
#elif defined(HALFBYTE_SYCL)
  return {xpu::float_to_half(x)};
#else
  return {__half_as_ushort(__float2half_rn(x))};
#endif
}
template <>
HALFBYTE_DEVICE BFloat narrow<BFloat>(float x) {
#if defined(HALFBYTE_PLAIN)
  const uint32_t bits = as_bits(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};  // stays NaN
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#else
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#endif
}

// Two 16-bit numbers in a word, the first in the low half.
template <class T>
HALFBYTE_DEVICE uint32_t narrow2(float low, float high) {
#if !defined(HALFBYTE_PLAIN)
  if constexpr (std::is_same_v<T, BFloat>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t word;
    memcpy(&word, &pair, 4);
    return word;
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    uint32_t word;
    memcpy(&word, &pair, 4);
    return word;
  }
#else
  return narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
#endif
}

// The two 16-bit numbers of a word.
template <class T>
HALFBYTE_DEVICE void widen2(uint32_t word, float& low, float& high) {
  if constexpr (std::is_same_v<T, BFloat>) {
    low = as_float(word << 16);
    high = as_float(word & 0xffff0000u);
  } else {
    low = widen(T{static_cast<uint16_t>(word)});
    high = widen(T{static_cast<uint16_t>(word >> 16)});
  }
}

HALFBYTE_DEVICE uint32_t reverse_bytes(uint32_t word) {
#if defined(HALFBYTE_PLAIN)
  return __builtin_bswap32(word);
#else
  return __byte_perm(word, 0, 0x0123);
#endif
}

// The sum of four products of signed bytes, and c.
HALFBYTE_DEVICE int32_t dot4(uint32_t a, uint32_t b, int32_t c) {
#if !defined(HALFBYTE_PLAIN)
  return __dp4a(static_cast<int>(a), static_cast<int>(b), c);
#else
  for (int i = 0; i < 32; i += 8) {
    c += static_cast<int8_t>(a >> i & 255u) * static_cast<int8_t>(b >> i & 255u);
  }
  return c;
#endif
}

// Byte i of a word as a signed number.  Conversions of integers run at a quarter of the rate of what is done
// here: the byte, made unsigned, becomes the last of the mantissa of 2^23.
HALFBYTE_DEVICE float widen_byte(uint32_t word, int i) {
  const uint32_t shifted = word ^ 0x80808080u;
#if !defined(HALFBYTE_PLAIN)
  const uint32_t bits = __byte_perm(shifted, 0x4b000000u, 0x7650u + static_cast<uint32_t>(i));
#else
  const uint32_t bits = (shifted >> 8 * i & 255u) | 0x4b000000u;
#endif
  return as_float(bits) - (8388608.0f + 128.0f);
}

// |x| <= 127 to the nearest integer, ties to even, as the last byte of a word.  Rounding by an addition: its
// conversions too would run at a quarter of the rate.
HALFBYTE_DEVICE uint32_t narrow_byte(float x) { return as_bits(x + 12582912.0f); }  // 1.5 * 2^23

// The last bytes of four words, the first one lowest.
HALFBYTE_DEVICE uint32_t last_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#if defined(HALFBYTE_PLAIN)
  return (a & 255u) | (b & 255u) << 8 | (c & 255u) << 16 | (d & 255u) << 24;
#else
  return __byte_perm(__byte_perm(a, b, 0x40), __byte_perm(c, d, 0x40), 0x5410);
#endif
}

// The first bytes of four words, the first one's lowest.
HALFBYTE_DEVICE uint32_t upper_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#if defined(HALFBYTE_PLAIN)
  return a >> 24 | b >> 24 << 8 | c >> 24 << 16 | d >> 24 << 24;
#else
  return __byte_perm(__byte_perm(a, b, 0x73), __byte_perm(c, d, 0x73), 0x5410);
#endif
}

// Byte i of a word.
HALFBYTE_DEVICE uint32_t byte_of(uint32_t word, int i) {
#if defined(HALFBYTE_PLAIN)
  return word >> 8 * i & 255u;
#else
  return __byte_perm(word, 0, 0x4440u + static_cast<uint32_t>(i));
#endif
}

// The sum over the lanes of a warp; every lane gets it.
template <int Lanes, class T>
HALFBYTE_DEVICE T warp_sum(T value) {
  HALFBYTE_UNROLL
  for (int mask = Lanes / 2; mask > 0; mask /= 2) value += HALFBYTE_SHFL_XOR(value, mask);
  return value;
}

// -- memory ------------------------------------------------------------------------------------------------------

// `Bytes` (2, 4, 8, 16) from memory that no one writes while the kernel runs, aligned to that.
template <int Bytes>
struct Words {
  uint32_t w[Bytes < 4 ? 1 : Bytes / 4];
};

template <int Bytes>
HALFBYTE_DEVICE Words<Bytes> load(const void* p) {
  Words<Bytes> to;
#if defined(HALFBYTE_PLAIN)
#define HALFBYTE_READ(type) *static_cast<const type*>(p)
#else
#define HALFBYTE_READ(type) __ldg(static_cast<const type*>(p))
#endif
  if constexpr (Bytes == 16) {
    const uint4 v = HALFBYTE_READ(uint4);
    to = {v.x, v.y, v.z, v.w};
  } else if constexpr (Bytes == 8) {
    const uint2 v = HALFBYTE_READ(uint2);
    to = {v.x, v.y};
  } else if constexpr (Bytes == 4) {
    to = {HALFBYTE_READ(uint32_t)};
  } else {
    static_assert(Bytes == 2);
    to = {HALFBYTE_READ(uint16_t)};
  }
#undef HALFBYTE_READ
  return to;
}

template <int Bytes>
HALFBYTE_DEVICE void store(void* p, Words<Bytes> from) {
  if constexpr (Bytes == 16) {
    *static_cast<uint4*>(p) = uint4{from.w[0], from.w[1], from.w[2], from.w[3]};
  } else if constexpr (Bytes == 8) {
    *static_cast<uint2*>(p) = uint2{from.w[0], from.w[1]};
  } else {
    static_assert(Bytes == 4);
    *static_cast<uint32_t*>(p) = from.w[0];
  }
}

// The 16 / sizeof(T) numbers of 16 bytes.
template <class T>
HALFBYTE_DEVICE void widen_all(Words<16> from, float* to) {
  HALFBYTE_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      to[i] = as_float(from.w[i]);
    } else {
      widen2<T>(from.w[i], to[2 * i], to[2 * i + 1]);
    }
  }
}

template <class T>
HALFBYTE_DEVICE Words<16> narrow_all(const float* from) {
  Words<16> to;
  HALFBYTE_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      to.w[i] = as_bits(from[i]);
    } else {
      to.w[i] = narrow2<T>(from[2 * i], from[2 * i + 1]);
    }
  }
  return to;
}

inline bool aligned(const void* p, uintptr_t to) { return reinterpret_cast<uintptr_t>(p) % to == 0; }

inline int log2_of(int64_t power) {
  int shift = 0;
  while ((int64_t{1} << shift) < power) ++shift;
  return shift;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// a / b for a that mostly fits 32 bits: a fifth of the time.
HALFBYTE_DEVICE int64_t quotient(int64_t a, int64_t b) {
  if ((a | b) >> 32 == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// -- types -------------------------------------------------------------------------------------------------------

// f with a value of the element type.
template <class Function>
const char* with_dtype(DType dtype, const Function& f) {
  switch (dtype) {
    case DType::float32:
      return f(float{});
    case DType::float16:
      return f(Half{});
    case DType::bfloat16:
      return f(BFloat{});
  }
  return "dtype must be float32, float16 or bfloat16";
}

}  // namespace halfbyte::gpu
