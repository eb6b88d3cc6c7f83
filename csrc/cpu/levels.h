// levels.h: the tables that the ISA files export, one each.
#pragma once
#include "halfbyte/cpu.h"

namespace halfbyte::cpu {

extern const Level level_scalar;
#ifdef HALFBYTE_X86
extern const Level level_avx2;
extern const Level level_avx512;
extern const Level level_avx512vnni;
extern const Level level_avx512bf16;
#endif

}  // namespace halfbyte::cpu
