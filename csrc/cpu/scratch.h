// scratch.h: per-thread working memory that is kept between calls, and huge pages.
#pragma once
#include <stddef.h>

namespace halfbyte::cpu {

enum Slot : int {
  slot_panel,
  slot_tile,
  slot_sums,
  slot_absmax,
  slot_codes,
  slot_codes2,
  slot_extra,
  slot_count
};

// At least `bytes` bytes, aligned to 64, valid until this thread asks for the same slot again; nullptr when
// memory is short.  Small requests keep their memory for the next call, so the hot path never allocates.  New
// memory begins with 64 zero bytes.
void* scratch(Slot slot, size_t bytes);

// Asks for huge pages under a large buffer that is about to be written.  A fresh allocation is otherwise
// faulted in 4 KiB at a time, which costs several times what the kernels that fill it do.
void expect_writes(void* data, size_t bytes);

inline constexpr const char* no_memory = "out of memory for working buffers";

}  // namespace halfbyte::cpu
