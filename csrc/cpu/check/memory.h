// memory.h: memory that notices a wrong address.
#pragma once
#include <stdint.h>

#include <cstddef>

namespace halfbyte::check {

// Where a buffer's end lies.  heap: AddressSanitizer watches both sides.  odd: the same, one byte past any
// alignment.  page: right before a page without access, which stops the masked loads and gathers that
// AddressSanitizer does not see, and needs no sanitizer at all.
enum class Place { heap, odd, page };

// Exactly `bytes` bytes, filled with 0xa5.
class Buffer {
 public:
  Buffer(int64_t bytes, Place place);
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <class T = void>
  T* at() const {
    return static_cast<T*>(static_cast<void*>(data_));
  }
  int64_t bytes() const { return bytes_; }

 private:
  unsigned char* data_;
  void* base_;  // of the allocation or mapping
  size_t mapped_;
  int64_t bytes_;
};

// A tensor of gigabytes in megabytes: `rows` times (`repeats` times one and the same `window` of memory, then
// one and the same `tail`), with no access for 32 GiB on either side, where a position cut to 32 bits would
// end up.  All sizes are in bytes and multiples of 4096.
class Repeated {
 public:
  Repeated(int64_t rows, int64_t repeats, int64_t window, int64_t tail);
  ~Repeated();
  Repeated(const Repeated&) = delete;
  Repeated& operator=(const Repeated&) = delete;

  bool ok() const { return base_ != nullptr; }
  template <class T = void>
  T* at() const {
    return static_cast<T*>(static_cast<void*>(base_));
  }
  // The window and, right behind it, the tail: once each.
  template <class T = void>
  T* near() const {
    return static_cast<T*>(static_cast<void*>(near_));
  }
  int64_t near_bytes() const { return near_bytes_; }

 private:
  unsigned char* base_ = nullptr;
  unsigned char* near_ = nullptr;
  void* reserved_ = nullptr;
  int64_t reserved_bytes_ = 0, near_bytes_ = 0;
};

}  // namespace halfbyte::check
