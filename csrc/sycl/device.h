// device.h: what kernels use of CUDA and of the C++ library, for the run-time compiler of SYCL.  It gets no other
// header: sycl.hpp takes it two seconds per kernel (2026.2), a kernel alone a tenth of that; and a machine that runs
// kernels may have no C++ library to develop with.
//
// HALFBYTE_LANES is the size of sub-groups.  Attributes and builtins are DPC++'s own, as its headers use them.
#pragma once

#define __global__                                                                                \
  [[__sycl_detail__::add_ir_attributes_function("sycl-nd-range-kernel", "sycl-sub-group-size", 2, \
                                                HALFBYTE_LANES)]]
#define __shared__ static __attribute__((opencl_local))
#define HALFBYTE_LAUNCH(...) ((void)0)
#define HALFBYTE_UNROLL _Pragma("unroll")
#define HALFBYTE_ROLL _Pragma("unroll 1")
#define __forceinline__ inline __attribute__((always_inline))

using size_t = decltype(sizeof 0);
using uintptr_t = size_t;
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned;
using int64_t = long;
using uint64_t = unsigned long;

SYCL_EXTERNAL __attribute__((const)) size_t __spirv_BuiltInLocalInvocationId(int);
SYCL_EXTERNAL __attribute__((const)) size_t __spirv_BuiltInWorkgroupId(int);
SYCL_EXTERNAL __attribute__((const)) size_t __spirv_BuiltInWorkgroupSize(int);
SYCL_EXTERNAL __attribute__((const)) size_t __spirv_BuiltInNumWorkgroups(int);
SYCL_EXTERNAL __attribute__((convergent)) void __spirv_ControlBarrier(int, int, int) noexcept;
SYCL_EXTERNAL __attribute__((convergent)) bool __spirv_GroupAny(int, bool) noexcept;
template <class T>
SYCL_EXTERNAL __attribute__((convergent)) T __spirv_GroupNonUniformShuffleXor(int, T, unsigned) noexcept;

namespace halfbyte::xpu {

constexpr int kWorkgroup = 2, kSubgroup = 3;    // scopes
constexpr int kOrdered = 0x10 | 0x100 | 0x200;  // sequentially consistent; local memory and global

struct Index {
  unsigned x, y;
};
#define HALFBYTE_INDEX(what) \
  halfbyte::xpu::Index { static_cast<unsigned>(what(0)), static_cast<unsigned>(what(1)) }

template <class T>
__forceinline__ T shuffle_xor(T value, int mask) {
  return __spirv_GroupNonUniformShuffleXor(kSubgroup, value, static_cast<unsigned>(mask));
}
__forceinline__ bool any_lane(bool holds) { return __spirv_GroupAny(kSubgroup, holds); }

__forceinline__ float half_to_float(uint16_t bits) { return __builtin_bit_cast(_Float16, bits); }
__forceinline__ uint16_t float_to_half(float x) {
  return __builtin_bit_cast(uint16_t, static_cast<_Float16>(x));
}

}  // namespace halfbyte::xpu

#define threadIdx (HALFBYTE_INDEX(__spirv_BuiltInLocalInvocationId))
#define blockIdx (HALFBYTE_INDEX(__spirv_BuiltInWorkgroupId))
#define blockDim (HALFBYTE_INDEX(__spirv_BuiltInWorkgroupSize))
#define gridDim (HALFBYTE_INDEX(__spirv_BuiltInNumWorkgroups))
#define __syncthreads() \
  __spirv_ControlBarrier(halfbyte::xpu::kWorkgroup, halfbyte::xpu::kWorkgroup, halfbyte::xpu::kOrdered)

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define memcpy __builtin_memcpy
__forceinline__ float fmaf(float a, float b, float c) { return __spirv_ocl_fma(a, b, c); }
__forceinline__ float fmaxf(float a, float b) { return __spirv_ocl_fmax(a, b); }
__forceinline__ float fminf(float a, float b) { return __spirv_ocl_fmin(a, b); }
__forceinline__ float fabsf(float x) { return __spirv_ocl_fabs(x); }
__forceinline__ float sqrtf(float x) { return __spirv_ocl_sqrt(x); }
__forceinline__ double fmin(double a, double b) { return __spirv_ocl_fmin(a, b); }
__forceinline__ double sqrt(double x) { return __spirv_ocl_sqrt(x); }
__forceinline__ double pow(double x, double y) { return __spirv_ocl_pow(x, y); }
__forceinline__ double exp(double x) { return __spirv_ocl_exp(x); }
__forceinline__ double log(double x) { return __spirv_ocl_log(x); }

namespace std {  // of <type_traits>

template <class T, T kValue>
struct integral_constant {
  static constexpr T value = kValue;
  using value_type = T;
};
template <bool kValue>
using bool_constant = integral_constant<bool, kValue>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <class A, class B>
constexpr bool is_same_v = false;
template <class A>
constexpr bool is_same_v<A, A> = true;

template <bool kChoice, class A, class B>
struct conditional {
  using type = A;
};
template <class A, class B>
struct conditional<false, A, B> {
  using type = B;
};
template <bool kChoice, class A, class B>
using conditional_t = typename conditional<kChoice, A, B>::type;

}  // namespace std
