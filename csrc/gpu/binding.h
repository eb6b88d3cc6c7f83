// binding.h: what the files that make the Python module share.  Addresses, the stream among them, and sizes come
// in as integers; the adapters have checked them and keep the tensors alive.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "halfbyte/gpu.h"

namespace halfbyte::gpu {

using Address = uintptr_t;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Runs a launcher on `device` (-1: as things are) without Python's lock; a text becomes RuntimeError.  The
// thread's current device is afterwards what it was: it is torch's business.
template <class Function>
void call(int device, Address stream, const Function& function) {
  const char* error = nullptr;
  {
    const pybind11::gil_scoped_release release;
    const int before = device < 0 ? device : current_device();
    if (device != before) error = set_device(device);
    use_stream(at(stream));
    if (error == nullptr) error = function();
    if (device != before && before >= 0) set_device(before);
  }
  if (error != nullptr) throw std::runtime_error(error);
}

inline Weight4 weight_of(Address packed, Address absmax, Address nested, Address codebook, Address offset,
                         int format, int64_t blocksize) {
  return {at<const uint8_t>(packed),
          {at(absmax), at<const float>(nested), at<const float>(codebook), at<const float>(offset)},
          static_cast<Format>(format),
          blocksize};
}

// In files of their own.
void bind_optimizer(pybind11::module_& module);

}  // namespace halfbyte::gpu
