// sources.h: the kernels' sources as embed.py puts them into the module; the last one has no name.
#pragma once

namespace halfbyte::xpu {

struct Source {
  const char* name;
  const char* text;
};
extern const Source sources[];

}  // namespace halfbyte::xpu
