// xpu.h: SYCL under portable.cuh.  A source of ../gpu is compiled twice: here, by the host's compiler, for its
// launchers, where the bodies of kernels serve for nothing; and from a copy in the module (sources.h), at run time,
// for the device that a kernel first runs on.  There device.h stands first.
#pragma once

#define __device__
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// -- the runtime's names, as far as portable.cuh uses them -------------------------------------------------------

using gpuStream_t = void*;       // a sycl::queue; nullptr is the module's own, on the CPU
using gpuError_t = const char*;  // why not
constexpr gpuError_t gpuSuccess = nullptr;
constexpr int gpuMultiprocessors = 0, gpuLanes = 1;
gpuError_t gpuGetLastError();  // and forgets it
inline const char* gpuGetErrorString(gpuError_t error) { return error; }
inline gpuError_t gpuGetDevice(int* device) { return *device = 0, gpuSuccess; }
gpuError_t gpuDeviceGetAttribute(int* value, int what, int device);  // of the device of use_stream()
gpuError_t gpuMemsetAsync(void* p, int value, size_t bytes, gpuStream_t stream);

// -- the host's side ---------------------------------------------------------------------------------------------

#ifndef __SYCL_DEVICE_ONLY__
#include <string>

namespace halfbyte::xpu {

// A kernel as the source spells it, and what it was compiled to.
struct Kernel {
  const char* source;      // the file's name
  std::string name;        // with template arguments
  std::string assertions;  // about the types of its parameters
  struct Built* built = nullptr;
};

struct Argument {
  const void* value;
  size_t size;
  bool pointer;
};

// gpuGetLastError() says what it came to.
void enqueue(Kernel& kernel, dim3 grid, dim3 block, gpuStream_t stream, const Argument* arguments, int count);

// "ns::f<int>" in what a compiler says of a function with that argument: "... [with auto kKernel = ns::f<int>]".
std::string name_in(const char* pretty);

template <auto kKernel>
std::string name_of() {
  return name_in(__PRETTY_FUNCTION__);
}

// Both compilers must lay a struct out alike.  DPC++ 2026.2 crashes where one is a template that nobody has
// instantiated; this does.
template <class T>
std::string assertion_of() {
  if (!std::is_class_v<T>) return "";
  return "static_assert(sizeof(" + name_in(__PRETTY_FUNCTION__) + ") == " + std::to_string(sizeof(T)) +
         ");\n";
}

template <auto kKernel>
struct Launch;

template <class... Parameters, void (*kKernel)(Parameters...)>
struct Launch<kKernel> {
  static void run(const char* source, dim3 grid, dim3 block, gpuStream_t stream, Parameters... parameters) {
    static Kernel kernel = {source, name_of<kKernel>(), (assertion_of<Parameters>() + ... + "")};
    const Argument arguments[] = {{&parameters, sizeof parameters, std::is_pointer_v<Parameters>}...};
    enqueue(kernel, grid, block, stream, arguments, sizeof...(parameters));
  }
};

// Stand-ins for device.h: the bodies of kernels must compile.
struct Index {
  unsigned x, y;
};
inline Index nowhere;
template <class T>
T shuffle_xor(T value, int) {
  return value;
}
inline bool any_lane(bool holds) { return holds; }
inline float half_to_float(uint16_t) { return 0.0f; }
inline uint16_t float_to_half(float) { return 0; }

}  // namespace halfbyte::xpu

#define __global__
#define __forceinline__ inline
#define __shared__ static
#define HALFBYTE_LANES 32
#define HALFBYTE_UNROLL
#define HALFBYTE_ROLL
#define threadIdx (halfbyte::xpu::nowhere)
#define blockIdx (halfbyte::xpu::nowhere)
#define blockDim (halfbyte::xpu::nowhere)
#define gridDim (halfbyte::xpu::nowhere)
#define __syncthreads() ((void)0)
#define HALFBYTE_LAUNCH(kernel, grid, block, smem, stream, ...) \
  halfbyte::xpu::Launch<kernel>::run(HALFBYTE_SOURCE, grid, block, stream, __VA_ARGS__)
#endif

#define HALFBYTE_SHFL_XOR(value, mask) halfbyte::xpu::shuffle_xor(value, mask)
