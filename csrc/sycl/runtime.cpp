// runtime.cpp: queues, launches, and kernels compiled when they are first run.  All of SYCL is in this file, and no
// exception leaves it: a failure is a text that gpuGetLastError() has.
//
// A launch names a queue: one of torch's, or the module's own.  That one is on the CPU as the OpenCL runtime shows
// it, for tests; it is waited for, since the CPU's tensors are read at once.
#include <sycl/sycl.hpp>

#include <list>
#include <mutex>
#include <optional>
#include <stdexcept>

#include "devices.h"
#include "halfbyte/gpu.h"
#include "sources.h"
#include "xpu.h"

namespace halfbyte::xpu {
namespace {

thread_local std::string failure;
thread_local bool failed = false;  // and gpuGetLastError() has not been asked since
thread_local gpuStream_t current = nullptr;

// Runs function and says whether it threw nothing.
template <class Function>
bool guarded(const Function& function) noexcept {
  try {
    function();
    return true;
  } catch (const std::exception& error) {
    failure = error.what();
  } catch (...) {
    failure = "SYCL failed and did not say why";
  }
  failed = true;
  return false;
}

// Never destroyed, like everything below that lives as long as the process: SYCL may be gone before.
::sycl::queue& own_queue() {
  static auto* queue = new ::sycl::queue(::sycl::cpu_selector_v, ::sycl::property::queue::in_order());
  return *queue;
}

::sycl::queue& queue_of(gpuStream_t stream) {
  return stream == nullptr ? own_queue() : *static_cast<::sycl::queue*>(stream);
}

// -- devices -------------------------------------------------------------------------------------------------------

struct Device {
  ::sycl::context context;
  ::sycl::device device;
  int lanes;  // in a sub-group
  int multiprocessors;
};

// How kernels are compiled from now on, see set_options().
struct Options {
  int lanes = 0;
  bool optimized = true;
};
Options chosen;

int lanes_of(const ::sycl::device& device) {
  for (const size_t size : device.get_info<::sycl::info::device::sub_group_sizes>()) {
    if (size == 32) return 32;
  }
  return 16;
}

// Xe cores, which CUDA would call multiprocessors, where they are known.
int multiprocessors_of(const ::sycl::device& device) {
  namespace info = ::sycl::ext::intel::info::device;
  if (device.has(::sycl::aspect::ext_intel_gpu_slices) &&
      device.has(::sycl::aspect::ext_intel_gpu_subslices_per_slice)) {
    return static_cast<int>(device.get_info<info::gpu_slices>() *
                            device.get_info<info::gpu_subslices_per_slice>());
  }
  return static_cast<int>(device.get_info<::sycl::info::device::max_compute_units>());
}

std::mutex mutex;  // of devices and kernels; held while one is compiled

Device& device_of(const ::sycl::queue& queue) {
  static auto* known = new std::list<Device>;
  const ::sycl::context context = queue.get_context();
  const ::sycl::device device = queue.get_device();
  const std::lock_guard<std::mutex> lock(mutex);
  for (Device& one : *known) {
    if (one.device == device && one.context == context) return one;
  }
  return known->emplace_back(Device{context, device, lanes_of(device), multiprocessors_of(device)});
}

int lanes_on(const Device& device) { return chosen.lanes != 0 ? chosen.lanes : device.lanes; }

// -- kernels -------------------------------------------------------------------------------------------------------

std::string text_of(const char* source) {
  for (const Source* one = sources; one->name != nullptr; ++one) {
    if (std::string(one->name) == source) return one->text;
  }
  throw std::logic_error(std::string("the module does not hold ") + source);
}

// How a text begins tells Python that another backend may try.  Of a compiler's report, the line with an error.
std::string refusal(const Kernel& kernel, const std::exception& error) {
  const std::string report = error.what();
  const size_t found = report.find("error:"), at = found == std::string::npos ? 0 : found;
  return "SYCL cannot compile " + kernel.name + ": " + report.substr(at, report.find('\n', at) - at);
}

}  // namespace

struct Built {
  const Device* device;
  Options options;
  std::optional<::sycl::kernel> kernel;
  std::string failure;  // where there is none
  Built* next;
};

namespace {

void compile(const Kernel& kernel, Built& built) {
  using namespace ::sycl::ext::oneapi::experimental;
  // Products and sums are each rounded, as in the reference; no header of this machine is read.
  std::vector<std::string> options = {
      "-DHALFBYTE_SYCL",          "-DHALFBYTE_LANES=" + std::to_string(built.options.lanes),
      "-ffp-contract=off",        "-foffload-fp32-prec-div",
      "-foffload-fp32-prec-sqrt", "-nostdlibinc"};
  if (!built.options.optimized) options.push_back("-O0");
#if __LIBSYCL_MAJOR_VERSION < 9
  options.push_back("-fno-sycl-device-lib=all");  // PyPI's 2025.3 lacks these libraries; no kernel needs one
#endif
  try {
    auto source = create_kernel_bundle_from_source(built.device->context, source_language::sycl,
                                                   text_of(kernel.source) + kernel.assertions);
    auto bundle = build(source, {built.device->device},
                        properties{build_options{options}, registered_names{kernel.name}});
    built.kernel = bundle.ext_oneapi_get_kernel(kernel.name);
  } catch (const std::exception& error) {
    built.failure = refusal(kernel, error);
  }
}

// Compiled once per device; a failure is kept as well.
const ::sycl::kernel& kernel_on(Kernel& kernel, const Device& device) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Options options = {lanes_on(device), chosen.optimized};
  const auto fits = [&](const Built& one) {
    return one.device == &device && one.options.lanes == options.lanes &&
           one.options.optimized == options.optimized;
  };
  Built* built = kernel.built;
  while (built != nullptr && !fits(*built)) built = built->next;
  if (built == nullptr) {
    built = kernel.built = new Built{&device, options, std::nullopt, "", kernel.built};
    compile(kernel, *built);
  }
  if (!built->kernel) throw std::runtime_error(built->failure);
  return *built->kernel;
}

void set(::sycl::handler& handler, int i, const Argument& argument) {
  if (argument.pointer) {
    handler.set_arg(i, *static_cast<void* const*>(argument.value));
  } else {
    handler.set_arg(i, ::sycl::ext::oneapi::experimental::raw_kernel_arg(argument.value, argument.size));
  }
}

}  // namespace

void enqueue(Kernel& kernel, dim3 grid, dim3 block, gpuStream_t stream, const Argument* arguments,
             int count) {
  guarded([&] {
    ::sycl::queue& queue = queue_of(stream);
    const ::sycl::kernel& built = kernel_on(kernel, device_of(queue));
    const ::sycl::nd_range<2> range({grid.y, size_t{grid.x} * block.x}, {1, block.x});
    try {
      queue.submit([&](::sycl::handler& handler) {
        for (int i = 0; i < count; ++i) set(handler, i, arguments[i]);
        handler.parallel_for(range, built);
      });
    } catch (const ::sycl::exception& error) {
      if (error.code() != ::sycl::errc::kernel_not_supported) throw;
      throw std::runtime_error(refusal(kernel, error));  // float64, on a device without
    }
    if (stream == nullptr) queue.wait_and_throw();
  });
}

std::string name_in(const char* pretty) {
  const std::string said = pretty;
  const size_t begin = said.find(" = ") + 3;
  std::string name = said.substr(begin, said.find_last_of("];") - begin);
  name = name.substr(0, name.find(';'));  // GCC goes on with what std::string is
  for (const std::string noise : {"{anonymous}::", "(anonymous namespace)::", "& "}) {
    for (size_t at = name.find(noise); at != std::string::npos; at = name.find(noise))
      name.erase(at, noise.size());
  }
  return name;
}

// -- what Python asks ----------------------------------------------------------------------------------------------

void set_options(int lanes, bool optimized) { chosen = {lanes, optimized}; }

std::vector<std::string> devices() {
  std::vector<std::string> names;
  guarded([&] {
    for (const ::sycl::device& device : ::sycl::device::get_devices()) {
      names.push_back(device.get_info<::sycl::info::device::name>());
    }
  });
  return names;
}

}  // namespace halfbyte::xpu

gpuError_t gpuGetLastError() {
  using namespace halfbyte::xpu;
  if (!failed) return gpuSuccess;
  failed = false;
  return failure.c_str();
}

gpuError_t gpuDeviceGetAttribute(int* value, int what, int) {
  using namespace halfbyte::xpu;
  const bool good = guarded([&] {
    const Device& device = device_of(queue_of(current));
    *value = what == gpuLanes ? lanes_on(device) : device.multiprocessors;
  });
  return good ? gpuSuccess : gpuGetLastError();
}

gpuError_t gpuMemsetAsync(void* p, int value, size_t bytes, gpuStream_t stream) {
  using namespace halfbyte::xpu;
  const bool good = guarded([&] {
    ::sycl::queue& queue = queue_of(stream);
    queue.memset(p, value, bytes);
    if (stream == nullptr) queue.wait_and_throw();
  });
  return good ? gpuSuccess : gpuGetLastError();
}

// -- gpu.h ---------------------------------------------------------------------------------------------------------

namespace halfbyte::gpu {

int device_count(const char** error) {
  int count = 0;
  const bool good = xpu::guarded(
      [&] { count = static_cast<int>(::sycl::device::get_devices(::sycl::info::device_type::gpu).size()); });
  if (!good) *error = gpuGetLastError();
  if (good && count == 0) *error = "the SYCL runtime shows no GPU";
  return count;
}

int current_device() { return -1; }

const char* set_device(int) { return nullptr; }  // a queue has its device

void use_stream(void* stream) { xpu::current = stream; }

const char* managed_alloc(int64_t, void**) { return "the SYCL module has no managed memory"; }

const char* managed_free(void*) { return nullptr; }

const char* managed_prefetch(const void*, int64_t, void*) { return nullptr; }

const char* archs() { return HALFBYTE_ARCHS; }

}  // namespace halfbyte::gpu
