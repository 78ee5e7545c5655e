// CUDA C++ on the processor: the keywords, built-in variables and functions that nefkern's kernels
// use, so that g++ compiles csrc/cuda/*.cuh as they stand.
//
// What CUDA leaves undefined is reported (scheduler.h); shared memory starts as 0xff bytes, lies on
// the heap where AddressSanitizer sees its ends, and is new for every block. Not here: cooperative
// groups, named barriers, grid-wide synchronisation, textures, wgmma, TMA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

#define threadIdx (::nefkern::emulator::current_block()->running().index)
#define blockIdx (::nefkern::emulator::current_block()->index())
#define blockDim (::nefkern::emulator::current_block()->shape())
#define gridDim (::nefkern::emulator::current_block()->grid())
constexpr int warpSize = 32;

using nefkern::emulator::dim3;
using nefkern::emulator::uint3;
using std::max;
using std::min;

// ---- vector types ----

#define NEFKERN_VECTOR(T, name, alignment)                   \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
  struct alignas(alignment) name##4 { T x, y, z, w; };       \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
NEFKERN_VECTOR(float, float, 16)
NEFKERN_VECTOR(int, int, 16)
NEFKERN_VECTOR(unsigned, uint, 16)
NEFKERN_VECTOR(unsigned short, ushort, 8)
#undef NEFKERN_VECTOR

// ---- half precision, as cuda_fp16.h and cuda_bf16.h name it ----

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

namespace nefkern::emulator {
template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace nefkern::emulator

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }
inline float __half2float(__half h) {
  return static_cast<float>(nefkern::emulator::bit_cast<_Float16>(h));
}
inline __half __float2half_rn(float value) {
  return nefkern::emulator::bit_cast<__half>(static_cast<_Float16>(value));
}
inline float __bfloat162float(__nv_bfloat16 b) {
  return nefkern::emulator::bit_cast<float>(static_cast<uint32_t>(b.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const auto bits = nefkern::emulator::bit_cast<uint32_t>(value);
  if (value != value) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// ---- barriers and warp collectives ----

inline void __syncthreads(int line = __builtin_LINE()) {
  nefkern::emulator::current_block()->barrier(0, line);
}
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  return static_cast<int>(nefkern::emulator::current_block()->barrier(predicate != 0, line));
}
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return nefkern::emulator::current_block()->barrier(predicate != 0, line) != 0;
}
inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
  return nefkern::emulator::current_block()->barrier(predicate == 0, line) == 0;
}

namespace nefkern::emulator {

// Every lane of `mask` brings a payload; `F{}(payloads, mask)` runs once all have come.
template <class Payload, class F>
void meet(const char* name, unsigned mask, Payload& payload, F, int line, unsigned parts = 1) {
  current_block()->collective(
      name, mask, &payload,
      [](void* const* lanes, unsigned all) { F{}(reinterpret_cast<Payload* const*>(lanes), all); },
      line, parts);
}

template <class F>
void for_lanes(unsigned mask, const F& f) {
  for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

template <class T>
T shuffle(const char* name, unsigned mask, T value, int source, int line) {
  struct Payload {
    T value, result;
    int source;
  } payload{value, {}, source};
  if (!(mask >> source & 1))
    current_block()->fail(std::string(name) + " at line " + std::to_string(line) +
                          ": source lane " + std::to_string(source) + " is not in the mask");
  meet(
      name, mask, payload,
      [](Payload* const* lanes, unsigned all) {
        for_lanes(all, [&](int lane) { lanes[lane]->result = lanes[lanes[lane]->source]->value; });
      },
      line, (sizeof(T) + 3) / 4);
  return payload.result;
}

inline int lane() { return static_cast<int>(current_block()->running().lane); }

struct Vote {
  bool predicate;
  unsigned ballot;
};
inline unsigned vote(const char* name, unsigned mask, bool predicate, int line) {
  Vote payload{predicate, 0};
  meet(
      name, mask, payload,
      [](Vote* const* lanes, unsigned all) {
        unsigned ballot = 0;
        for_lanes(all, [&](int l) { ballot |= unsigned{lanes[l]->predicate} << l; });
        for_lanes(all, [&](int l) { lanes[l]->ballot = ballot; });
      },
      line);
  return payload.ballot;
}

// A reduction whose result every lane gets; F{}(a, b) combines two values.
template <class T, class F>
T reduce(const char* name, unsigned mask, T value, F, int line) {
  struct Payload {
    T value;
  } payload{value};
  meet(
      name, mask, payload,
      [](Payload* const* lanes, unsigned all) {
        T total = lanes[__builtin_ctz(all)]->value;
        for_lanes(all & (all - 1), [&](int l) { total = F{}(total, lanes[l]->value); });
        for_lanes(all, [&](int l) { lanes[l]->value = total; });
      },
      line);
  return payload.value;
}

}  // namespace nefkern::emulator

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  nefkern::emulator::vote("__syncwarp", mask, false, line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  const int base = nefkern::emulator::lane() & ~(width - 1);
  return nefkern::emulator::shuffle("__shfl_sync", mask, value, base + (source & (width - 1)),
                                    line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32, int line = __builtin_LINE()) {
  const int lane = nefkern::emulator::lane(), source = lane ^ other;
  const bool inside = source <= (lane | (width - 1));
  return nefkern::emulator::shuffle("__shfl_xor_sync", mask, value, inside ? source : lane, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   int line = __builtin_LINE()) {
  const int lane = nefkern::emulator::lane(), source = lane + static_cast<int>(delta);
  const bool inside = source <= (lane | (width - 1));
  return nefkern::emulator::shuffle("__shfl_down_sync", mask, value, inside ? source : lane, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 int line = __builtin_LINE()) {
  const int lane = nefkern::emulator::lane(), source = lane - static_cast<int>(delta);
  const bool inside = source >= (lane & ~(width - 1));
  return nefkern::emulator::shuffle("__shfl_up_sync", mask, value, inside ? source : lane, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return nefkern::emulator::vote("__ballot_sync", mask, predicate != 0, line);
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return nefkern::emulator::vote("__any_sync", mask, predicate != 0, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return nefkern::emulator::vote("__all_sync", mask, predicate == 0, line) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, int line = __builtin_LINE()) {
  struct Payload {
    T value;
    unsigned same;
  } payload{value, 0};
  nefkern::emulator::meet(
      "__match_any_sync", mask, payload,
      [](Payload* const* lanes, unsigned all) {
        using nefkern::emulator::for_lanes;
        for_lanes(all, [&](int l) {
          for_lanes(all, [&](int other) {
            if (lanes[other]->value == lanes[l]->value) lanes[l]->same |= 1u << other;
          });
        });
      },
      line);
  return payload.same;
}
#define NEFKERN_REDUCE(name, expression)                                     \
  template <class T>                                                         \
  T name(unsigned mask, T value, int line = __builtin_LINE()) {              \
    static_assert(std::is_integral_v<T>);                                    \
    return nefkern::emulator::reduce(                                        \
        #name, mask, value, [](T a, T b) -> T { return expression; }, line); \
  }
NEFKERN_REDUCE(__reduce_add_sync, a + b)
NEFKERN_REDUCE(__reduce_min_sync, b < a ? b : a)
NEFKERN_REDUCE(__reduce_max_sync, b > a ? b : a)
NEFKERN_REDUCE(__reduce_or_sync, a | b)
NEFKERN_REDUCE(__reduce_and_sync, a& b)
#undef NEFKERN_REDUCE

// ---- arithmetic and loads ----

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) {
  return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64;
}
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1) << (31 - bit);
  return reversed;
}
inline unsigned __float_as_uint(float x) { return nefkern::emulator::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return nefkern::emulator::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return nefkern::emulator::bit_cast<float>(x); }
inline float __int_as_float(int x) { return nefkern::emulator::bit_cast<float>(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}

// ---- atomics ----

#define NEFKERN_ATOMIC(name, expression)                                                    \
  template <class T>                                                                        \
  NEFKERN_UNCHECKED __attribute__((noinline)) T name(T* p, std::type_identity_t<T> value) { \
    if (nefkern::emulator::nefkern_race_atomic)                                             \
      nefkern::emulator::nefkern_race_atomic(p, sizeof(T));                                 \
    const T old = *p;                                                                       \
    *p = expression;                                                                        \
    return old;                                                                             \
  }
NEFKERN_ATOMIC(atomicAdd, old + value)
NEFKERN_ATOMIC(atomicSub, old - value)
NEFKERN_ATOMIC(atomicMax, value > old ? value : old)
NEFKERN_ATOMIC(atomicMin, value < old ? value : old)
NEFKERN_ATOMIC(atomicExch, value)
NEFKERN_ATOMIC(atomicOr, old | value)
NEFKERN_ATOMIC(atomicAnd, old& value)
#undef NEFKERN_ATOMIC
template <class T>
NEFKERN_UNCHECKED __attribute__((noinline)) T atomicCAS(T* p, std::type_identity_t<T> expected,
                                                        std::type_identity_t<T> value) {
  if (nefkern::emulator::nefkern_race_atomic) nefkern::emulator::nefkern_race_atomic(p, sizeof(T));
  const T old = *p;
  if (old == expected) *p = value;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- the runtime: one device, and every stream finishes at once ----

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t) {
  if (bytes) std::memset(to, byte, bytes);
  return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  if (bytes) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

#include "device_twins.h"
