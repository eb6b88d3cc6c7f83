// prelude.h: what every ISA file starts from.
//
// ISA files are compiled for one instruction set each.  A library template or inline function instantiated
// there could be the copy the linker keeps for the whole module and would crash an older CPU, so these files
// include only C headers and intrinsics, and everything in them stands in an anonymous namespace.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "halfbyte/cpu.h"
#include "halfbyte/tables.h"
#include "index.h"
#include "scratch.h"

#define HALFBYTE_UNROLL _Pragma("GCC unroll 16")
// Inner loops stand alone: inlined into one large function, GCC 12 spills their accumulators.
#define HALFBYTE_ALONE __attribute__((noinline))

namespace halfbyte::cpu {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

HALFBYTE_INLINE float as_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

HALFBYTE_INLINE uint32_t as_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

// The element at p, which may have any alignment: what tensors come with.
template <class T>
HALFBYTE_INLINE T read(const void* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}

template <class T>
HALFBYTE_INLINE void write(void* p, T value) {
  memcpy(p, &value, sizeof value);
}

// f(0) .. f(count - 1) over `threads` threads, handed out one by one so that a disturbed core holds nobody
// up.
template <class Function>
HALFBYTE_INLINE void parallel_for(int threads, int64_t count, const Function& f) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < count; ++i) f(i);
}

// f(first, end) over `count` elements that are written to `out`.  Pieces of a large output end where its huge
// pages do: of two threads that touch one fresh page the second waits until the kernel has zeroed it for the
// first.
template <class T, class Function>
HALFBYTE_INLINE void parallel_pieces(int threads, const T* out, int64_t count, int64_t piece, bool large,
                                     const Function& f) {
  constexpr int64_t page = (int64_t{2} << 20) / static_cast<int64_t>(sizeof(T));
  const int64_t shift = large ? static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) / sizeof(T)) % page : 0;
  if (large) piece = page;
  parallel_for(threads, ceil_div(count + shift, piece),
               [&](int64_t c) { f(max64(0, c * piece - shift), min64(count, (c + 1) * piece - shift)); });
}

// One vector of which `size` lanes are there: missing ones are read as 0 and not written.
template <class V, class T>
HALFBYTE_INLINE typename V::F load_part(const T* p, int64_t size) {
  if (size >= V::W) return V::load(p);
  T part[V::W] = {};
  memcpy(part, p, static_cast<size_t>(size) * sizeof(T));
  return V::load(part);
}

template <class V, class T>
HALFBYTE_INLINE void store_part(T* p, int64_t size, typename V::F a) {
  if (size >= V::W) return V::store(p, a);
  T part[V::W];
  V::store(part, a);
  memcpy(p, part, static_cast<size_t>(size) * sizeof(T));
}

// Calls f with a typed null pointer that carries the element type.
template <class Function>
HALFBYTE_INLINE const char* with_dtype(DType dtype, const Function& f) {
  switch (dtype) {
    case DType::float32:
      return f(static_cast<float*>(nullptr));
    case DType::float16:
      return f(static_cast<Half*>(nullptr));
    case DType::bfloat16:
      return f(static_cast<BFloat*>(nullptr));
  }
  return "dtype must be float32, float16 or bfloat16";
}

// The type behind such a pointer.
template <class Pointer>
struct Pointed;
template <class T>
struct Pointed<T*> {
  using Type = T;
};

}  // namespace
}  // namespace halfbyte::cpu
