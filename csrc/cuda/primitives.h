// The two primitives that CUB has and that are not worth writing again.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/runtime.h"

namespace nefkern::cuda {

// Temporary memory that a call with `count` elements needs.
cudaError_t scan_bytes(int64_t count, size_t* bytes);
cudaError_t sort_bytes(int64_t count, size_t* bytes);

// numbers[i] becomes the sum of numbers[0 .. i - 1].
cudaError_t exclusive_scan(void* temporary, size_t bytes, int64_t* numbers, int64_t count,
                           cudaStream_t stream);

// Two arrays of keys and two of values; a sort reads the first of each and may swap them, so that
// the sorted ones are the first again.
struct SortBuffers {
  uint64_t* keys[2];
  float* values[2];
};

// Sorts pairs by the lowest `bits` bits of their keys; pairs of equal keys keep their order.
cudaError_t sort_pairs(void* temporary, size_t bytes, SortBuffers& buffers, int64_t count, int bits,
                       cudaStream_t stream);

}  // namespace nefkern::cuda
