// wgmma8.cuh: D (registers) = or += A . B, both in shared memory along k: int8 to int32 with m64nNk32, and float32 +=
// 16-bit with m64nNk16.  Their accumulators lie alike, and in one array of bits: two would need registers twice.
#pragma once
#include "hopper.cuh"

namespace halfbyte::cuda {

// clang-format off
#define HALFBYTE_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define HALFBYTE_R1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define HALFBYTE_R2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define HALFBYTE_R3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define HALFBYTE_R4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define HALFBYTE_R5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define HALFBYTE_R6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define HALFBYTE_R7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define HALFBYTE_R8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define HALFBYTE_R9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define HALFBYTE_R10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define HALFBYTE_R11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define HALFBYTE_R12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define HALFBYTE_R13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define HALFBYTE_R14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define HALFBYTE_R15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define HALFBYTE_D(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define HALFBYTE_R_16 HALFBYTE_R0
#define HALFBYTE_D_16(c) HALFBYTE_D(c, 0)
#define HALFBYTE_R_32 HALFBYTE_R_16 ", " HALFBYTE_R1
#define HALFBYTE_D_32(c) HALFBYTE_D_16(c), HALFBYTE_D(c, 8)
#define HALFBYTE_R_64 HALFBYTE_R_32 ", " HALFBYTE_R2 ", " HALFBYTE_R3
#define HALFBYTE_D_64(c) HALFBYTE_D_32(c), HALFBYTE_D(c, 16), HALFBYTE_D(c, 24)
#define HALFBYTE_R_128 HALFBYTE_R_64 ", " HALFBYTE_R4 ", " HALFBYTE_R5 ", " HALFBYTE_R6 ", " HALFBYTE_R7
#define HALFBYTE_D_128(c) HALFBYTE_D_64(c), HALFBYTE_D(c, 32), HALFBYTE_D(c, 40), HALFBYTE_D(c, 48), HALFBYTE_D(c, 56)
#define HALFBYTE_R_256 HALFBYTE_R_128 ", " HALFBYTE_R8 ", " HALFBYTE_R9 ", " HALFBYTE_R10 ", " HALFBYTE_R11 ", " HALFBYTE_R12 ", " HALFBYTE_R13 ", " HALFBYTE_R14 ", " HALFBYTE_R15
#define HALFBYTE_D_256(c) HALFBYTE_D_128(c), HALFBYTE_D(c, 64), HALFBYTE_D(c, 72), HALFBYTE_D(c, 80), HALFBYTE_D(c, 88), HALFBYTE_D(c, 96), HALFBYTE_D(c, 104), HALFBYTE_D(c, 112), HALFBYTE_D(c, 120)
// clang-format on

#define HALFBYTE_WGMMA_INT8(n, a_at, b_at, p_at)                                                   \
  __device__ __forceinline__ void wgmma(int (&d)[n / 2], uint64_t a, uint64_t b, int accumulate) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_at                                        \
                 ", 0;\n"                                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k32.s32.s8.s8 {" HALFBYTE_R_##n           \
                 "}, %" #a_at ", %" #b_at ", p;\n}\n"                                              \
                 : HALFBYTE_D_##n("+r")                                                            \
                 : "l"(a), "l"(b), "r"(accumulate));                                               \
  }
#define HALFBYTE_WGMMA_ADD(n, type, suffix, a_at, b_at)                                         \
  __device__ __forceinline__ void wgmma_add(int (&d)[n / 2], uint64_t a, uint64_t b, type) {    \
    asm volatile(                                                                               \
        "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"                                              \
        "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." suffix "." suffix " {" HALFBYTE_R_##n \
        "}, %" #a_at ", %" #b_at ", p, 1, 1, 0, 0;\n}\n"                                        \
        : HALFBYTE_D_##n("+r")                                                                  \
        : "l"(a), "l"(b));                                                                      \
  }
#define HALFBYTE_WGMMA(n, first, second, third)               \
  HALFBYTE_WGMMA_INT8(n, first, second, third)                \
  HALFBYTE_WGMMA_ADD(n, __nv_bfloat16, "bf16", first, second) \
  HALFBYTE_WGMMA_ADD(n, __half, "f16", first, second)

HALFBYTE_WGMMA(16, 8, 9, 10)
HALFBYTE_WGMMA(32, 16, 17, 18)
HALFBYTE_WGMMA(64, 32, 33, 34)
HALFBYTE_WGMMA(128, 64, 65, 66)
HALFBYTE_WGMMA(256, 128, 129, 130)

#undef HALFBYTE_WGMMA

// After a wait: what read sums must not be moved before it.
template <int N>
__device__ __forceinline__ void pin(int (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

}  // namespace halfbyte::cuda
