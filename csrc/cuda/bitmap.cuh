// A set of nodes as bits in shared memory, and the place of each node among those that are in it:
// sorting and counting different nodes without comparing any.
#pragma once

#include "cuda/launches.h"
#include "cuda/warp.cuh"

namespace nefkern::cuda {

constexpr int64_t kMaxBitmapNodes = 1 << 16;  // 8 KiB of bits; a place fits 16
constexpr int kWordBits = 32;

struct Bitmap {
  uint32_t* present;  // [words], a bit a node
  uint16_t* before;   // [words], how many are present before a word
  int words;
};

constexpr int words_of(int64_t num_nodes) {
  return static_cast<int>(round_up(tiles(num_nodes, kWordBits), 2));
}
constexpr size_t bitmap_bytes(int words) { return words * (sizeof(uint32_t) + sizeof(uint16_t)); }

namespace {

__device__ __forceinline__ Bitmap bitmap_at(void* memory, int words) {
  uint32_t* present = static_cast<uint32_t*>(memory);
  return {present, reinterpret_cast<uint16_t*>(present + words), words};
}

template <int kThreads>
__device__ __forceinline__ void clear(const Bitmap& bitmap) {
  for (int word = threadIdx.x; word < bitmap.words; word += kThreads) bitmap.present[word] = 0;
}

__device__ __forceinline__ void mark(const Bitmap& bitmap, int node) {
  atomicOr(&bitmap.present[node / kWordBits], 1u << node % kWordBits);
}

// How many marked nodes are smaller.
__device__ __forceinline__ int place_of(const Bitmap& bitmap, int node) {
  const int word = node / kWordBits;
  return bitmap.before[word] + __popc(bitmap.present[word] & lanes_below(node % kWordBits));
}

// Fills `before`; returns how many nodes are marked. For the whole block, between two barriers of
// its own. A thread has words of its own one after the other, an odd number: no bank conflicts.
template <int kThreads>
__device__ __forceinline__ int count_marked(const Bitmap& bitmap) {
  constexpr int kWarps = kThreads / kWarp;
  struct Totals {
    int of[kWarps];
  };
  int* totals = block_shared<Totals>().of;
  const int share = (bitmap.words + kThreads - 1) / kThreads | 1;
  const int begin = min(static_cast<int>(threadIdx.x) * share, bitmap.words);
  const int end = min(begin + share, bitmap.words);
  const int lane = lane_id(), warp = threadIdx.x / kWarp;
  int own = 0;
  for (int word = begin; word < end; ++word) own += __popc(bitmap.present[word]);
  int up_to_here = own;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int below = __shfl_up_sync(kAllLanes, up_to_here, distance);
    if (lane >= distance) up_to_here += below;
  }
  if (lane == kWarp - 1) totals[warp] = up_to_here;
  __syncthreads();
  int all = 0, count = up_to_here - own;
  for (int other = 0; other < kWarps; ++other) {
    if (other < warp) count += totals[other];
    all += totals[other];
  }
  for (int word = begin; word < end; ++word) {
    bitmap.before[word] = static_cast<uint16_t>(count);
    count += __popc(bitmap.present[word]);
  }
  __syncthreads();
  return all;
}

}  // namespace
}  // namespace nefkern::cuda
