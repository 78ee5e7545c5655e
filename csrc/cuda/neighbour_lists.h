// Neighbour lists in device memory, as knn writes them.
#pragma once

#include <cstdint>

namespace nefkern::cuda {

// Up to so many nodes a graph's rows are merged by bitmaps in shared memory; of more nodes all
// edges are sorted. An assembly's merged_nodes may be less, to try the other way.
constexpr int64_t kMergedNodes = 1 << 16;
// A node that so many lists name is a hub, whose row is begun before all others. An assembly's
// long_names may be less, to try that.
constexpr int64_t kLongNames = 4096;

struct NeighbourLists {
  const void* indices;   // [N, size] int32 or int64: -1 (padding) to N - 1
  bool wide_indices;     // int64
  int64_t size;          // k, of every list
  const float* weights;  // [N, size], or null for weight 1
  float clamp_min;       // of the weights, at least 0
};

}  // namespace nefkern::cuda
