// driver.cpp: halfbyte_cpu_check, every CPU kernel of every level that the machine has, without Python.
//
// Built with the address and undefined-behaviour sanitizers by HALFBYTE_SANITIZE=ON (`nox -s sanitize`), it
// needs neither to be useful.  Exit code 1 where a level disagrees with the scalar one, with a sentence for
// each case.
//
//   halfbyte_cpu_check [small] [far | far-all]      without arguments: small and far
#include <cstdio>
#include <cstring>

#include "check.h"

int main(int count, char** names) {
  using namespace halfbyte::check;
  const auto asked = [&](const char* name) {
    for (int i = 1; i < count; ++i) {
      if (std::strcmp(names[i], name) == 0) return true;
    }
    return false;
  };
  std::printf("levels:");
  for (const Level* level : machine_levels()) std::printf(" %s", level->name);
  std::printf("\n");
  if (count == 1 || asked("small")) {
    timed("elementwise", check_elementwise);
    timed("linear", check_linear);
    timed("optimizer", check_optimizer);
  }
  if (count == 1 || asked("far") || asked("far-all")) timed("far", [&] { check_far(asked("far-all")); });
  if (failures() != 0) {
    std::fprintf(stderr, "%lld disagreements\n", static_cast<long long>(failures()));
    return 1;
  }
  return 0;
}
