// runtime.cu: what the binding asks of the runtime.
#include "halfbyte/gpu.h"
#include "portable.cuh"

namespace halfbyte::gpu {
namespace {

const char* text_of(gpuError_t status) {
  if (status == gpuSuccess) return nullptr;
  (void)gpuGetLastError();  // so that the next launch does not report it
  return gpuGetErrorString(status);
}

}  // namespace

int device_count(const char** error) {
  int count = 0;
  const gpuError_t status = gpuGetDeviceCount(&count);
  if (status == gpuSuccess) return count;
  *error = text_of(status);
  return 0;
}

int current_device() {
  int device = -1;
  if (gpuGetDevice(&device) == gpuSuccess) return device;
  (void)gpuGetLastError();
  return -1;
}

const char* set_device(int device) { return text_of(gpuSetDevice(device)); }

const char* managed_alloc(int64_t size, void** data) {
  return text_of(gpuMallocManaged(data, static_cast<size_t>(size)));
}

const char* managed_free(void* data) { return text_of(gpuFree(data)); }

const char* managed_prefetch(const void* data, int64_t size, void* stream) {
  return text_of(gpuMemPrefetchAsync(data, static_cast<size_t>(size), current_device(),
                                     static_cast<gpuStream_t>(stream)));
}

void use_stream(void*) {}

const char* archs() { return HALFBYTE_ARCHS; }

}  // namespace halfbyte::gpu
