// Sixteen floats at a time: one AVX-512 register, two of AVX2, four of SSE or NEON.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/isa.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // the vectors never cross a call that isn't inlined

namespace nefkern::cpu::NEFKERN_ISA {
// A name of its own to the linker: simd.h has functions of these names for vectors of the
// processor's width.
inline namespace sixteen {

constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(64)));

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

inline Lanes load(const float* p) {
  Lanes x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

inline void store(float* p, const Lanes& x) { std::memcpy(p, &x, sizeof(x)); }

inline Lanes broadcast(float x) { return x - Lanes{}; }

// A fixed tree: halves added together, four times.
inline float sum(const Lanes& x) {
  const Lanes a =
      x + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  const Lanes b = a + __builtin_shufflevector(a, a, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3);
  const Lanes c = b + __builtin_shufflevector(b, b, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1);
  return c[0] + c[1];
}

// Bit l is set where x[l] >= y[l]; never for NaN.
inline uint32_t at_least(const Lanes& x, const Lanes& y) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_GE_OQ);
#elif defined(__AVX2__)
  __m256 a[2], b[2];
  std::memcpy(a, &x, sizeof(x));
  std::memcpy(b, &y, sizeof(y));
  return _mm256_movemask_ps(_mm256_cmp_ps(a[0], b[0], _CMP_GE_OQ)) |
         _mm256_movemask_ps(_mm256_cmp_ps(a[1], b[1], _CMP_GE_OQ)) << 8;
#else
  uint32_t mask = 0;
  for (int l = 0; l < kLanes; ++l) mask |= static_cast<uint32_t>(x[l] >= y[l]) << l;
  return mask;
#endif
}

// Calls f(l) for every set bit l, lowest first.
template <class F>
inline void for_each_bit(uint32_t mask, const F& f) {
  for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

}  // namespace sixteen
}  // namespace nefkern::cpu::NEFKERN_ISA
