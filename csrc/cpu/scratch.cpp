// scratch.cpp: see scratch.h.  Outside the ISA files, because those must not instantiate library code.
#include "scratch.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace halfbyte::cpu {
namespace {

struct Buffers {
  void* data[slot_count] = {};
  size_t size[slot_count] = {};
  ~Buffers() {
    for (void* p : data) std::free(p);
  }
};

thread_local Buffers buffers;

constexpr size_t huge_page = size_t{2} << 20;

}  // namespace

void expect_writes(void* data, size_t bytes) {
#ifdef __linux__
  if (bytes < 2 * huge_page) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + huge_page - 1) / huge_page * huge_page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / huge_page * huge_page;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // a hint: refusal does no harm
#else
  (void)data;
  (void)bytes;
#endif
}

void* scratch(Slot slot, size_t bytes) {
  Buffers& b = buffers;
  if (b.size[slot] < bytes || b.data[slot] == nullptr) {
    std::free(b.data[slot]);
    const size_t size = (bytes + bytes / 8 + 4096 + 63) / 64 * 64;
    b.data[slot] = std::aligned_alloc(64, size);
    b.size[slot] = b.data[slot] != nullptr ? size : 0;
    if (b.data[slot] != nullptr) {
      expect_writes(b.data[slot], size);
      std::memset(b.data[slot], 0, 64);
    }
  }
  return b.data[slot];
}

}  // namespace halfbyte::cpu
