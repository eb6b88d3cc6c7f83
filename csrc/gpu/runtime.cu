// runtime.cu: what the binding asks of the runtime.
#include "halfbyte/gpu.h"
#include "portable.cuh"

namespace halfbyte::gpu {

int device_count(const char** error) {
  int count = 0;
  const gpuError_t status = gpuGetDeviceCount(&count);
  if (status == gpuSuccess) return count;
  (void)gpuGetLastError();  // so that the next launch does not report it
  *error = gpuGetErrorString(status);
  return 0;
}

int current_device() {
  int device = -1;
  if (gpuGetDevice(&device) == gpuSuccess) return device;
  (void)gpuGetLastError();
  return -1;
}

const char* set_device(int device) {
  const gpuError_t status = gpuSetDevice(device);
  if (status == gpuSuccess) return nullptr;
  (void)gpuGetLastError();
  return gpuGetErrorString(status);
}

const char* archs() { return HALFBYTE_ARCHS; }

}  // namespace halfbyte::gpu
