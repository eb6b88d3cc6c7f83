// devices.h: what Python asks of the SYCL runtime besides launches.
#pragma once
#include <string>
#include <vector>

namespace halfbyte::xpu {

// How kernels are compiled from now on.  lanes: in a sub-group, 16 or 32; 0 for 32 where a device has it, else 16.
// Not optimized: for the CPU, whose compiler takes a fifth of the time then.
void set_options(int lanes, bool optimized);

// Names of all devices, none where the runtime fails.
std::vector<std::string> devices();

}  // namespace halfbyte::xpu
