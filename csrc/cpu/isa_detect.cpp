#include <cstdlib>
#include <cstring>

#include "cpu/isa.h"

namespace nefkern::cpu {
namespace {

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Bf16;
  if (avx2 && avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

}  // namespace

const char* isa_name(Isa isa) {
  static constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512bf16"};
  return kNames[static_cast<int>(isa)];
}

Isa best_isa() {
  static const Isa best = [] {
    const Isa found = detect();
    const char* wanted = std::getenv("NEFKERN_ISA");
    for (int level = 0; wanted && level < static_cast<int>(found); ++level)
      if (std::strcmp(wanted, isa_name(static_cast<Isa>(level))) == 0)
        return static_cast<Isa>(level);
    return found;
  }();
  return best;
}

}  // namespace nefkern::cpu
