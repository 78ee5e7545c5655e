// The emulated twins of csrc/cuda/device.cuh: what takes compiler extensions or inline PTX there.
//
// Fragments follow the layouts that the PTX manual documents ("Matrix Fragments for mma"): lane l
// holds the elements of group g = l / 4 and of place p = l % 4 inside the group.
#pragma once

#include "cuda/limits.h"

// One instruction of a GPU: kept out of the kernels' code, whose instructions costs.py counts.
#define NEFKERN_TWIN __attribute__((noinline))

namespace nefkern::cuda {

template <class T>
T& block_shared() {
  static_assert(sizeof(T) <= kMaxStaticShared);
  static_assert(std::is_trivially_default_constructible_v<T>, "shared memory has no constructors");
  static const char key = 0;
  return *static_cast<T*>(nefkern::emulator::current_block()->shared(&key, sizeof(T), alignof(T)));
}

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(nefkern::emulator::current_block()->dynamic_shared());
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t, Args... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (shared_bytes > kMaxDynamicShared)
    throw nefkern::emulator::Failure("more dynamic shared memory than every GPU has");
  if (nefkern::emulator::nefkern_count_kernel)
    nefkern::emulator::nefkern_count_kernel(reinterpret_cast<const void*>(kernel),
                                            uint64_t{grid.x} * grid.y * grid.z);
  nefkern::emulator::launch(grid, block, shared_bytes, [=] { kernel(args...); });
  return cudaSuccess;
}

// ---- cp.async: bytes arrive at the wait, and until then the target holds 0xff ----

NEFKERN_TWIN inline void cp_async_16(void* shared, const void* global, bool in_bounds = true) {
  auto& thread = nefkern::emulator::current_block()->running();
  for (const void* address : {static_cast<const void*>(shared), global})
    if (reinterpret_cast<uintptr_t>(address) % 16)
      nefkern::emulator::current_block()->fail("cp_async_16: an address is not aligned to 16");
  if (nefkern::emulator::nefkern_count_wide) {
    char* place = static_cast<char*>(__builtin_return_address(0));  // two accesses
    if (in_bounds) nefkern::emulator::nefkern_count_wide(global, false, place);
    nefkern::emulator::nefkern_count_wide(shared, true, place + 1);
  }
  const nefkern::emulator::Quiet quiet;
  for (int word = 0; word < 4; ++word) static_cast<uint32_t*>(shared)[word] = 0xffffffffu;
  thread.copies.push_back({shared, in_bounds ? global : nullptr, thread.copy_groups});
}

inline void cp_async_commit() { ++nefkern::emulator::current_block()->running().copy_groups; }

// Waits for all but the newest kPending groups of the calling thread.
template <int kPending>
NEFKERN_TWIN void cp_async_wait() {
  auto& thread = nefkern::emulator::current_block()->running();
  const nefkern::emulator::Quiet quiet;
  size_t done = 0;
  for (const auto& copy : thread.copies) {
    if (copy.group >= thread.copy_groups - kPending) break;
    for (int word = 0; word < 4; ++word)
      static_cast<uint32_t*>(copy.to)[word] =
          copy.from ? static_cast<const uint32_t*>(copy.from)[word] : 0;
    ++done;
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + done);
}

// ---- tensor cores ----

namespace twins {

constexpr int kRows = 16, kColumns = 8;

// What a lane brings to a product: its fragments as registers, c and d as floats.
template <int kRegistersA, int kRegistersB>
struct Fragments {
  uint32_t a[kRegistersA], b[kRegistersB];
  float c[4], d[4];
};

inline int row_of_c(int lane, int i) { return lane / 4 + (i >= 2 ? 8 : 0); }
inline int column_of_c(int lane, int i) { return lane % 4 * 2 + (i & 1); }

// D = A B + C for a [16, kDepth] and b [kDepth, 8], given by a_of(payloads, row, k), b_of(payloads,
// k, column).
template <int kDepth, class Payload, class A, class B>
void multiply(Payload* const* lanes, const A& a_of, const B& b_of) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      double sum = lanes[lane]->c[i];
      for (int k = 0; k < kDepth; ++k)
        sum += static_cast<double>(a_of(row_of_c(lane, i), k)) * b_of(k, column_of_c(lane, i));
      lanes[lane]->d[i] = static_cast<float>(sum);
    }
}

}  // namespace twins

// Two elements a register.
NEFKERN_TWIN inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2], const float (&c)[4],
                                          int line = __builtin_LINE()) {
  using Payload = twins::Fragments<4, 2>;
  Payload payload;
  std::memcpy(payload.a, a, sizeof a);
  std::memcpy(payload.b, b, sizeof b);
  std::memcpy(payload.c, c, sizeof c);
  nefkern::emulator::meet(
      "mma.m16n8k16.f16", 0xffffffffu, payload,
      [](Payload* const* lanes, unsigned) {
        const auto half = [](uint32_t word, int which) {
          return __half2float(__half{static_cast<uint16_t>(word >> (16 * which))});
        };
        twins::multiply<16>(
            lanes,
            [&](int row, int k) {  // registers: rows g and g + 8, then the same of k + 8
              const int lane = row % 8 * 4 + k % 8 / 2;
              return half(lanes[lane]->a[row / 8 + k / 8 * 2], k % 2);
            },
            [&](int k, int column) {
              return half(lanes[column * 4 + k % 8 / 2]->b[k / 8], k % 2);
            });
      },
      line);
  std::memcpy(d, payload.d, sizeof d);
}

namespace twins {

struct MatrixRow {
  uint16_t row[8];        // the one whose address this lane gave
  uint32_t registers[4];  // what it receives
};

inline void load_matrices(uint32_t (&registers)[4], const void* shared_row, int line, void* place) {
  if (reinterpret_cast<uintptr_t>(shared_row) % 16)
    nefkern::emulator::current_block()->fail("ldmatrix: a row is not aligned to 16 bytes");
  MatrixRow payload{};
  if (nefkern::emulator::nefkern_count_wide)
    nefkern::emulator::nefkern_count_wide(shared_row, false, place);
  {
    const nefkern::emulator::Quiet quiet;
    for (int i = 0; i < 8; ++i) payload.row[i] = static_cast<const uint16_t*>(shared_row)[i];
  }
  nefkern::emulator::meet(
      "ldmatrix.x4", 0xffffffffu, payload,
      [](MatrixRow* const* lanes, unsigned) {
        for (int lane = 0; lane < 32; ++lane)
          for (int matrix = 0; matrix < 4; ++matrix) {
            const auto element = [&](int row, int column) -> uint32_t {
              return lanes[8 * matrix + row]->row[column];
            };
            const int group = lane / 4, place = lane % 4 * 2;
            lanes[lane]->registers[matrix] = element(group, place) | element(group, place + 1)
                                                                         << 16;
          }
      },
      line);
  std::memcpy(registers, payload.registers, sizeof registers);
}

}  // namespace twins

NEFKERN_TWIN inline void ldmatrix_x4(uint32_t (&registers)[4], const void* shared_row,
                                     int line = __builtin_LINE()) {
  twins::load_matrices(registers, shared_row, line, __builtin_return_address(0));
}
}  // namespace nefkern::cuda
