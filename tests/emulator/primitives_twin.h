// What csrc/cuda/primitives.cu gets from CUB, from the standard library. Some temporary memory is
// asked for, so that a launcher that forgets it is noticed.
#pragma once

#include <algorithm>
#include <numeric>
#include <utility>

#include "cuda/primitives.h"

namespace nefkern::cuda {

constexpr size_t kTemporaryBytes = 64;

inline cudaError_t scan_bytes(int64_t, size_t* bytes) {
  *bytes = kTemporaryBytes;
  return cudaSuccess;
}
inline cudaError_t sort_bytes(int64_t, size_t* bytes) {
  *bytes = 2 * kTemporaryBytes;
  return cudaSuccess;
}

inline cudaError_t exclusive_scan(void* temporary, size_t bytes, int64_t* numbers, int64_t count,
                                  cudaStream_t) {
  if (bytes < kTemporaryBytes) throw emulator::Failure("exclusive_scan: too little memory");
  std::memset(temporary, 0xee, kTemporaryBytes);
  std::exclusive_scan(numbers, numbers + count, numbers, int64_t{0});
  return cudaSuccess;
}

inline cudaError_t sort_pairs(void* temporary, size_t bytes, SortBuffers& buffers, int64_t count,
                              int bits, cudaStream_t) {
  if (bytes < 2 * kTemporaryBytes) throw emulator::Failure("sort_pairs: too little memory");
  std::memset(temporary, 0xee, 2 * kTemporaryBytes);
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  const auto key = [&](int64_t i) { return buffers.keys[0][i] << (64 - bits); };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return key(a) < key(b); });
  for (int64_t i = 0; i < count; ++i) {
    buffers.keys[1][i] = buffers.keys[0][order[i]];
    buffers.values[1][i] = buffers.values[0][order[i]];
  }
  const bool odd_passes = (bits + 7) / 8 % 2;  // as CUB leaves them
  if (odd_passes) {
    std::swap(buffers.keys[0], buffers.keys[1]);
    std::swap(buffers.values[0], buffers.values[1]);
  } else {
    std::copy_n(buffers.keys[1], count, buffers.keys[0]);
    std::copy_n(buffers.values[1], count, buffers.values[0]);
    std::fill_n(buffers.keys[1], count, ~uint64_t{0});
  }
  return cudaSuccess;
}

}  // namespace nefkern::cuda
