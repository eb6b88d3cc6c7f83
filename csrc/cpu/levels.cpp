// levels.cpp: which levels are built, and which of them this CPU runs.
#include "levels.h"

#include <string.h>

namespace halfbyte::cpu {

const Level* const* levels(int* count) {
  static const Level* const all[] = {
      &level_scalar,
#ifdef HALFBYTE_X86
      &level_avx2,   &level_avx512, &level_avx512vnni, &level_avx512bf16,
#endif
  };
  *count = static_cast<int>(sizeof(all) / sizeof(all[0]));
  return all;
}

bool supports(const char* name) {
  if (strcmp(name, "scalar") == 0) return true;
#ifdef HALFBYTE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (strcmp(name, "avx2") == 0) return avx2;  // F16C came with the generation before AVX2
  if (strcmp(name, "avx512") == 0) return avx512;
  if (strcmp(name, "avx512vnni") == 0) return avx512 && __builtin_cpu_supports("avx512vnni");
  if (strcmp(name, "avx512bf16") == 0) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return false;
}

}  // namespace halfbyte::cpu
