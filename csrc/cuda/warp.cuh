// Steps that a whole warp takes together.
#pragma once

#include "cuda/device.cuh"

namespace nefkern::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
// The warp's number in the grid, which is one-dimensional in x, as its blocks are.
__device__ __forceinline__ int64_t global_warp() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
}
__device__ __forceinline__ unsigned lanes_below(int lane) { return (1u << lane) - 1; }

// The same sum in every lane, always added in the same order.
__device__ __forceinline__ double warp_sum(double value) {
  for (int distance = kWarp / 2; distance; distance /= 2)
    value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// The first place in [begin, end) whose element is not below `value`.
template <class T>
__device__ __forceinline__ int64_t lower_bound(const T* sorted, int64_t begin, int64_t end,
                                               T value) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (sorted[middle] < value)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// The last of `count` ranges, 1 at least, that begins at `position` or before, by a warp together;
// begin_of(i) never falls, and begin_of(0) does not lie behind.
template <class BeginOf>
__device__ __forceinline__ int64_t range_of(int64_t count, int64_t position,
                                            const BeginOf& begin_of) {
  int64_t first = 0, end = count;  // it is in [first, end)
  while (end - first > 1) {
    const int64_t step = (end - first + kWarp - 1) / kWarp, mine = first + lane_id() * step;
    const unsigned before = __ballot_sync(kAllLanes, mine < end && begin_of(mine) <= position);
    first += (before ? kWarp - 1 - __clz(before) : 0) * step;
    end = min(first + step, end);
  }
  return first;
}

}  // namespace nefkern::cuda
