// Instruction sets: every kernel file of this folder is compiled once per level, each copy in a
// namespace of its own, and the processor decides at run time which copy is called.
#pragma once

#include <cstdint>

namespace nefkern::cpu {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// The best level that this processor (and the environment variable NEFKERN_ISA) allows.
Isa best_isa();
const char* isa_name(Isa isa);

}  // namespace nefkern::cpu

// The namespace of the copy being compiled; CMake defines NEFKERN_ISA for the kernel files.
#ifndef NEFKERN_ISA
#define NEFKERN_ISA baseline
#endif

#if defined(__x86_64__)
#define NEFKERN_FOR_EACH_ISA(F) F(baseline) F(avx2) F(avx512) F(avx512bf16)
#else
#define NEFKERN_FOR_EACH_ISA(F) F(baseline)
#endif

// Declares `result name parameters;` in every level's namespace, and `name` in nefkern::cpu as a
// reference to the function that this processor should run:
//   NEFKERN_DECLARE(void, spmm, (const SpmmArgs& args));
#if defined(__x86_64__)
#define NEFKERN_DECLARE(result, name, parameters)                                           \
  namespace baseline {                                                                      \
  result name parameters;                                                                   \
  }                                                                                         \
  namespace avx2 {                                                                          \
  result name parameters;                                                                   \
  }                                                                                         \
  namespace avx512 {                                                                        \
  result name parameters;                                                                   \
  }                                                                                         \
  namespace avx512bf16 {                                                                    \
  result name parameters;                                                                   \
  }                                                                                         \
  inline auto name##_for(Isa isa) -> result(*) parameters {                                 \
    static constexpr decltype(&baseline::name) kTable[] = {baseline::name, avx2::name,      \
                                                           avx512::name, avx512bf16::name}; \
    return kTable[static_cast<int>(isa)];                                                   \
  }                                                                                         \
  static_assert(true, "")
#else
#define NEFKERN_DECLARE(result, name, parameters)                                \
  namespace baseline {                                                           \
  result name parameters;                                                        \
  }                                                                              \
  inline auto name##_for(Isa) -> result(*) parameters { return baseline::name; } \
  static_assert(true, "")
#endif
