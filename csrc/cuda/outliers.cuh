// outliers.cuh: what LLM.int8()'s products share: which columns of x have outliers, and their operands for wgmma.
//
// Quantized rows have zeros where x had outliers, and only there.  In the other rows of such a column the integers stay,
// and what they miss of x is multiplied in 16 bits: (x - q * absmax / 127) . weight, where x itself is what is missing of
// an outlier.  So no pass has to clear columns, and the weight's integers are exact in x's dtype.
#pragma once
#include "halfbyte/gemm8.h"
#include "hopper.cuh"

namespace halfbyte::cuda {

constexpr int kFeeders = 96;   // threads that find and gather, of a warpgroup whose first warp copies
constexpr int kGathered = 32;  // outlier columns at a time: rows of 64 bytes of an operand, swizzled
constexpr float kPer127 = 1.0f / 127.0f;

// What a product multiplies.
template <class T>
struct Layer8 {
  const T* x;
  const int8_t* weight;
  const float* weight_absmax;
  const T* bias;
  T* y;
  int m, n, k;
  Rows8 rows;
};

template <class T>
Layer8<T> layer_of(const Linear8& a, const Rows8& rows) {
  return {static_cast<const T*>(a.x),
          a.weight,
          a.weight_absmax,
          static_cast<const T*>(a.bias),
          static_cast<T*>(a.y),
          static_cast<int>(a.m),
          static_cast<int>(a.n),
          static_cast<int>(a.k),
          rows};
}

template <int kThreads = kFeeders>
__device__ __forceinline__ void feeders_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// What is known of the outlier columns in a part of k, in shared memory.
struct Found {
  int count;
  int columns[kGathered];  // the first of them
  int many;                // blocks of rows with more columns than they named
  uint8_t blocks[kMostBlocks8];
};

// Sets the bits of the outlier columns among 128 * [first, first + slices) in mask, 16 bytes of shared memory per slice.
template <int kThreads = kFeeders>
__device__ __forceinline__ void mark_outliers(const Rows8& rows, int first, int slices, uint32_t* mask,
                                              Found* found, int thread) {
  for (int i = thread; i < slices * 4; i += kThreads) mask[i] = 0;
  if (thread == 0) found->many = 0;
  feeders_sync<kThreads>();
  for (int block = thread; block < rows.blocks; block += kThreads) {
    const uint4 named = __ldcg(reinterpret_cast<const uint4*>(rows.named) + block);
    const uint32_t of[4] = {named.x, named.y, named.z, named.w};
    const int size = of[0] & 0xffff;
    if (size > kNamed) found->blocks[atomicAdd(&found->many, 1)] = block;
#pragma unroll
    for (int i = 1; i <= kNamed; ++i) {
      const int column = static_cast<int>(of[i / 2] >> i % 2 * 16 & 0xffff) - first * 128;
      if (i <= size && size <= kNamed && column >= 0 && column < slices * 128)
        atomicOr(mask + column / 32, 1u << column % 32);
    }
  }
  feeders_sync<kThreads>();
  // A thread looks at 128 columns of every so-manieth block.
  const int many = found->many, groups = max(1, min(kThreads / slices, many));
  for (int item = thread; many > 0 && item < groups * slices; item += kThreads) {
    const int group = item / slices, slice = item - group * slices;
    uint4 bits = {};
#pragma unroll 4
    for (int i = group; i < many; i += groups) {
      const uint4 more = __ldcg(reinterpret_cast<const uint4*>(
          rows.masks + static_cast<int64_t>(found->blocks[i]) * rows.pitch + (first + slice) * 16));
      bits.x |= more.x, bits.y |= more.y, bits.z |= more.z, bits.w |= more.w;
    }
    uint32_t* to = mask + slice * 4;
    if (bits.x) atomicOr(to, bits.x);
    if (bits.y) atomicOr(to + 1, bits.y);
    if (bits.z) atomicOr(to + 2, bits.z);
    if (bits.w) atomicOr(to + 3, bits.w);
  }
  if (many > 0) feeders_sync<kThreads>();
}

// Lists the outlier columns of that range in rows.list + 128 * first, ascending.  Every block that asks for a range
// writes the same.
__device__ __forceinline__ void list_outliers(const Rows8& rows, int first, int slices, uint32_t* mask,
                                              Found* found, int thread) {
  mark_outliers(rows, first, slices, mask, found, thread);
  if (thread < 32) {
    const int each = (slices * 4 + 31) / 32, begin = thread * each, end = min(begin + each, slices * 4);
    int own = 0;
    for (int i = begin; i < end; ++i) own += __popc(mask[i]);
    int before = own;
    for (int reach = 1; reach < 32; reach *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, before, reach);
      if (thread >= reach) before += other;
    }
    if (thread == 31) found->count = before;
    int at = before - own;
    for (int i = begin; i < end; ++i) {
      for (uint32_t word = mask[i]; word != 0; word &= word - 1, ++at) {
        const int column = (first * 4 + i) * 32 + __ffs(word) - 1;
        rows.list[first * 128 + at] = column;
        if (at < kGathered) found->columns[at] = column;
      }
    }
  }
  feeders_sync();
}

// What the integers of a row miss of x.
template <class T>
__device__ __forceinline__ float missing(const Layer8<T>& a, int row, int column) {
  const int64_t at = static_cast<int64_t>(row) * a.k + column;
  return fmaf(static_cast<float>(__ldg(a.rows.q + at)), -__ldg(a.rows.absmax + row) * kPer127,
              to_float(__ldg(a.x + at)));
}

// Rows of `value(row, column)` at `listed` of at most kGathered columns, which are in shared memory, as a wgmma operand
// at `to`, zeros elsewhere.  All loads of a row's piece are under way together.
template <class T, int kRows, int kThreads, class Value>
__device__ __forceinline__ void gather(uint8_t* to, const int* columns, int listed, int thread,
                                       const Value& value) {
  for (int piece = 0; piece < kGathered / 8; ++piece) {
    const int some = listed - piece * 8;
#pragma unroll
    for (int row = thread; row < kRows; row += kThreads) {
      float v[8];
      if (some > 0) {
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = value(row, columns[piece * 8 + min(j, some - 1)]);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = j < some ? v[j] : 0.f;
      *reinterpret_cast<uint4*>(to + row * 64 + ((piece ^ (row >> 1 & 3)) << 4)) = make_uint4(
          pack(v[0], v[1], T()), pack(v[2], v[3], T()), pack(v[4], v[5], T()), pack(v[6], v[7], T()));
    }
  }
}
// Rows beyond the last are copies of it: nobody stores what they give.
template <class T, int kRows, int kThreads>
__device__ __forceinline__ void gather_weight(uint8_t* to, const Layer8<T>& a, int row0, const int* columns,
                                              int listed, int thread) {
  gather<T, kRows, kThreads>(to, columns, listed, thread, [&](int row, int column) {
    return static_cast<float>(
        __ldg(a.weight + static_cast<int64_t>(min(row0 + row, a.n - 1)) * a.k + column));
  });
}
template <class T, int kRows, int kThreads>
__device__ __forceinline__ void gather_x(uint8_t* to, const Layer8<T>& a, int row0, const int* columns,
                                         int listed, int thread) {
  gather<T, kRows, kThreads>(to, columns, listed, thread, [&](int row, int column) {
    return missing(a, min(row0 + row, a.m - 1), column);
  });
}

// wgmma's descriptor of gathered rows of 64 bytes with their swizzle.
__device__ __forceinline__ uint64_t rows_of_64(uint32_t address) {
  return (2ull << 62) | (32ull << 32) | (1ull << 16) | (address & 0x3ffff) >> 4;
}

// -- host ------------------------------------------------------------------------------------------------------

// Boxes of `box_rows` x 128 of an int8 matrix [rows, k], zeros outside.
inline bool int8_map(CUtensorMap* map, const void* p, int64_t rows, int64_t k, int box_rows) {
  const cuuint64_t dims[2] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(k)};
  const cuuint32_t box[2] = {128, static_cast<cuuint32_t>(box_rows)};
  return encode_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, p, dims, strides, box,
                           CU_TENSOR_MAP_SWIZZLE_128B);
}

}  // namespace halfbyte::cuda
