// One float vector per instruction set, so that a kernel is written once. Vec is a GCC/Clang
// vector:
// +, −, *, / and comparisons with ?: work on it; what the language lacks is below.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/isa.h"

namespace nefkern::cpu {

// Storage types of the half precisions.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace nefkern::cpu

namespace nefkern::cpu::NEFKERN_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

using Vec = float __attribute__((vector_size(4 * kLanes)));
using IntVec = int32_t __attribute__((vector_size(4 * kLanes)));
using ShortVec = uint16_t __attribute__((vector_size(2 * kLanes)));

inline int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

inline Vec broadcast(float x) { return x - Vec{}; }

inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// Where one operand is NaN, the second is the result.
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

template <class F>
inline float reduce(Vec x, const F& combine) {
  using Quad = float __attribute__((vector_size(16)));
  Quad parts[kLanes / 4];
  std::memcpy(parts, &x, sizeof x);
  for (int i = 1; i < kLanes / 4; ++i) parts[0] = combine(parts[0], parts[i]);
  return combine(combine(parts[0][0], parts[0][1]), combine(parts[0][2], parts[0][3]));
}

inline float sum(Vec x) {
  return reduce(x, [](auto a, auto b) { return a + b; });
}

inline float max(Vec x) {
  return reduce(x, [](auto a, auto b) { return a > b ? a : b; });
}

// e^x for x ≤ 0 within 1 ulp; 0 where the result would be subnormal; NaN stays NaN. With n the
// integer nearest to x·log2(e), e^x = 2^n e^r and |r| ≤ ln(2)/2; the polynomial is Cephes' expf.
inline Vec exp_nonpositive(Vec x) {
  const Vec least = broadcast(-87.33654f);
  const Vec clamped = max(least, x);
  const Vec magic = broadcast(12582912.f);  // 1.5·2^23: a sum's low bits are the rounded integer
  const Vec shifted = fma(clamped, broadcast(1.44269504f), magic);
  const Vec n = shifted - magic;
  Vec r = fma(n, broadcast(-0.693359375f), clamped);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.f;
  const IntVec scale = ((IntVec)shifted + 127) << 23;
  return x < least ? Vec{} : p * (Vec)scale;
}

// ---- loads and stores; half precisions are converted ----

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }

// Zero-extended. (GCC splits its own conversion in two; the masked one avoids its bug 105593.)
inline IntVec widen(ShortVec x) {
#if defined(__AVX512F__)
  return (IntVec)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x);
#else
  return __builtin_convertvector(x, IntVec);
#endif
}

inline Vec load(const BFloat16* p) {
  ShortVec bits;
  std::memcpy(&bits, p, sizeof bits);
  return (Vec)(widen(bits) << 16);
}

// Rounds to nearest, ties to even; a NaN stays one.
inline void store(BFloat16* p, Vec x) {
  const IntVec bits = (IntVec)x;
  const IntVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const IntVec quiet = (bits >> 16) | 0x40;
  const ShortVec result = __builtin_convertvector(x == x ? rounded : quiet, ShortVec);
  std::memcpy(p, &result, sizeof result);
}

// GCC's plain conversions read an uninitialised vector (its bug 105593); the masked ones do not.
#if defined(__AVX512F__)
inline Vec load(const Half* p) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(Half* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
inline Vec load(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(Half* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#else
// Without instructions for it: a half's exponent and fraction, shifted into a float, are 2^112 too
// small, which a product puts right, subnormals included.
inline Vec load(const Half* p) {
  ShortVec half;
  std::memcpy(&half, p, sizeof half);
  const IntVec bits = __builtin_convertvector(half, IntVec);
  const IntVec magnitude = (bits & 0x7fff) << 13;
  const Vec scaled = (Vec)magnitude * 0x1p112f;
  const IntVec special = magnitude | (0xff << 23);
  return (Vec)((magnitude >= (0x1f << 23) ? special : (IntVec)scaled) | ((bits & 0x8000) << 16));
}
// Adding a power of two that is 2^13 times the value makes the processor round at the half's last
// bit, subnormals included (after M. Dukhan's FP16 library); the product saturates to infinity.
inline void store(Half* p, Vec x) {
  const IntVec bits = (IntVec)x, magnitude = bits & 0x7fffffff;
  const IntVec exponent = magnitude & (0xff << 23), least = IntVec{} + (113 << 23);
  const Vec unit = (Vec)((exponent > least ? exponent : least) + (15 << 23));
  const IntVec rounded = (IntVec)(unit + (Vec)magnitude * 0x1p112f * 0x1p-110f);
  const IntVec number = ((rounded >> 13) & 0x7c00) + (rounded & 0xfff);
  const IntVec result = magnitude > (0xff << 23) ? IntVec{} + 0x7e00 : number;
  const ShortVec half = __builtin_convertvector(result | ((bits >> 16) & 0x8000), ShortVec);
  std::memcpy(p, &half, sizeof half);
}
#endif

// The first n ≤ kLanes elements; the other lanes are `fill` on loading and left alone on storing.
template <class T>
inline Vec load(const T* p, int64_t n, float fill = 0) {
  if (n >= kLanes) return load(p);
  T part[kLanes] = {};
  std::memcpy(part, p, static_cast<size_t>(n) * sizeof(T));
  Vec x = load(part);
  for (int64_t i = n; i < kLanes; ++i) x[i] = fill;
  return x;
}

template <class T>
inline void store(T* p, Vec x, int64_t n) {
  if (n >= kLanes) return store(p, x);
  T part[kLanes];
  store(part, x);
  std::memcpy(p, part, static_cast<size_t>(n) * sizeof(T));
}

}  // namespace nefkern::cpu::NEFKERN_ISA
