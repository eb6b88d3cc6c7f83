// memory.cpp: see memory.h.
#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace halfbyte::check {
namespace {

constexpr int64_t kPage = 4096;

void* map(void* where, int64_t bytes, int protection, int flags, int file, int64_t offset) {
  void* p = mmap(where, static_cast<size_t>(bytes), protection, flags, file, offset);
  return p == MAP_FAILED ? nullptr : p;
}

[[noreturn]] void stop(const char* sentence) {
  std::fprintf(stderr, "%s\n", sentence);
  std::exit(2);
}

}  // namespace

Buffer::Buffer(int64_t bytes, Place place) : mapped_(0), bytes_(bytes) {
  if (place == Place::page) {
    const int64_t pages = (bytes + kPage - 1) / kPage * kPage;
    mapped_ = static_cast<size_t>(pages + kPage);
    base_ = map(nullptr, pages + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == nullptr) stop("mmap failed");
    data_ = static_cast<unsigned char*>(base_) + (pages - bytes);
    if (mprotect(static_cast<unsigned char*>(base_) + pages, kPage, PROT_NONE) != 0) stop("mprotect failed");
  } else {
    const int64_t shift = place == Place::odd ? 1 : 0;
    base_ = std::malloc(static_cast<size_t>(bytes + shift));
    if (base_ == nullptr) stop("malloc failed");
    data_ = static_cast<unsigned char*>(base_) + shift;
  }
  std::memset(data_, 0xa5, static_cast<size_t>(bytes));
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(other.data_), base_(other.base_), mapped_(other.mapped_), bytes_(other.bytes_) {
  other.base_ = nullptr;
}

Buffer::~Buffer() {
  if (base_ == nullptr) return;
  if (mapped_ != 0) {
    munmap(base_, mapped_);
  } else {
    std::free(base_);
  }
}

Repeated::Repeated(int64_t rows, int64_t repeats, int64_t window, int64_t tail) {
  constexpr int64_t kAside = int64_t{32} << 30;
  const int64_t total = rows * (repeats * window + tail);
  const int file = memfd_create("halfbyte-check", 0);
  if (file < 0) return;
  near_bytes_ = window + tail;
  reserved_bytes_ = total + 2 * kAside;
  if (ftruncate(file, near_bytes_) == 0) {
    reserved_ = map(nullptr, reserved_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    near_ =
        static_cast<unsigned char*>(map(nullptr, near_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
  }
  bool good = reserved_ != nullptr && near_ != nullptr;
  unsigned char* to = good ? static_cast<unsigned char*>(reserved_) + kAside : nullptr;
  for (int64_t row = 0; row < rows && good; ++row) {
    for (int64_t i = 0; i <= repeats && good; ++i) {
      const int64_t size = i < repeats ? window : tail, offset = i < repeats ? 0 : window;
      if (size == 0) continue;
      good = map(to, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, offset) != nullptr;
      to += size;
    }
  }
  close(file);
  if (good) base_ = static_cast<unsigned char*>(reserved_) + kAside;
}

Repeated::~Repeated() {
  if (reserved_ != nullptr) munmap(reserved_, static_cast<size_t>(reserved_bytes_));
  if (near_ != nullptr) munmap(near_, static_cast<size_t>(near_bytes_));
}

}  // namespace halfbyte::check
