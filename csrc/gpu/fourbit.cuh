// fourbit.cuh: reading 4-bit weights: levels in shared memory, the scale of a block plain or nested.
#pragma once
#include "halfbyte/tables.h"
#include "portable.cuh"

namespace halfbyte::gpu {

struct Levels {
  float level[16];
};

inline Levels levels_of(Format format) {
  Levels levels;
  memcpy(levels.level, format == Format::fp4 ? fp4_levels : nf4_levels, sizeof levels.level);
  return levels;
}

constexpr int kCopies = 32;  // of each level: every lane looks up in a bank of its own

// Shared memory of a kernel that decodes.
struct Tables4 {
  float level[16 * kCopies];
  float codebook[256];  // of nested scales
};

// Every thread of the block calls this, then waits.
HALFBYTE_DEVICE void fill_tables(Tables4& tables, const Levels& levels, const Absmax& absmax) {
  for (unsigned i = threadIdx.x; i < 16 * kCopies; i += blockDim.x) {
    tables.level[i] = levels.level[i / kCopies];
  }
  if (absmax.nested == nullptr) return;
  for (unsigned i = threadIdx.x; i < 256; i += blockDim.x) tables.codebook[i] = absmax.codebook[i];
}

HALFBYTE_DEVICE float level_of(const Tables4& tables, uint32_t code) {
  return tables.level[code * kCopies + threadIdx.x % kCopies];
}

template <bool Nested>
HALFBYTE_DEVICE float scale_of(const Tables4& tables, const Absmax& absmax, float offset, int64_t block) {
  if constexpr (!Nested) return static_cast<const float*>(absmax.values)[block];
  const float level = tables.codebook[static_cast<const uint8_t*>(absmax.values)[block]];
  return level * absmax.nested[block >> 8] + offset;
}

// f(std::bool_constant): whether scales are nested.
template <class Function>
const char* with_nested(const Absmax& absmax, const Function& f) {
  return absmax.nested != nullptr ? f(std::true_type()) : f(std::false_type());
}

}  // namespace halfbyte::gpu
