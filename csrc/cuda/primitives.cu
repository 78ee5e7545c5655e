#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#include <utility>

#include "cuda/primitives.h"

namespace nefkern::cuda {
namespace {

constexpr int kKeyBits = 64;

// The first of each pair is read, and is where the sorted ones are to be found.
cudaError_t sort(void* temporary, size_t& bytes, SortBuffers& buffers, int64_t count, int bits,
                 cudaStream_t stream) {
  cub::DoubleBuffer<uint64_t> keys(buffers.keys[0], buffers.keys[1]);
  cub::DoubleBuffer<float> values(buffers.values[0], buffers.values[1]);
  const cudaError_t error =
      cub::DeviceRadixSort::SortPairs(temporary, bytes, keys, values, count, 0, bits, stream);
  buffers = {{keys.Current(), keys.Alternate()}, {values.Current(), values.Alternate()}};
  return error;
}

}  // namespace

cudaError_t scan_bytes(int64_t count, size_t* bytes) {
  int64_t* none = nullptr;
  return cub::DeviceScan::ExclusiveSum(nullptr, *bytes, none, none, count);
}

cudaError_t exclusive_scan(void* temporary, size_t bytes, int64_t* numbers, int64_t count,
                           cudaStream_t stream) {
  return cub::DeviceScan::ExclusiveSum(temporary, bytes, numbers, numbers, count, stream);
}

cudaError_t sort_bytes(int64_t count, size_t* bytes) {
  SortBuffers none{};
  return sort(nullptr, *bytes, none, count, kKeyBits, nullptr);
}

cudaError_t sort_pairs(void* temporary, size_t bytes, SortBuffers& buffers, int64_t count, int bits,
                       cudaStream_t stream) {
  return sort(temporary, bytes, buffers, count, bits, stream);
}

}  // namespace nefkern::cuda
