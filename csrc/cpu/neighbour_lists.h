// Neighbour lists as the graph kernels get them, and the workspaces that rows are assembled in.
#pragma once

#include <cstdint>

namespace nefkern::cpu {

// One edge of the transposed lists: `row` lists the node whose edges these are.
struct IncomingEdge {
  int32_t row;
  float weight;
};

// Row i lists the neighbours of node i.
struct NeighbourLists {
  int64_t size;          // k
  const void* indices;   // [N, k] int32 or int64: -1 (padding) to N - 1
  bool wide_indices;     // int64
  const float* weights;  // [N, k], or null for weight 1
  float clamp_min;       // of the weights, at least 0
  // Workspaces of the transposed lists: [N + 1] and [N k].
  int64_t* incoming_offsets;
  IncomingEdge* incoming;
};

// What one row of the graph after another is assembled in, thread by thread.
struct RowWorkspace {
  int64_t num_nodes;  // N
  int64_t workers;    // threads; the lists are split in as many parts
  int64_t* cursors;   // [workers, N]
  float* dense;       // [workers, row_dense_floats(N)]
  uint8_t* maps;      // [workers, row_map_bytes(N)]
};

// A worker's workspaces, rounded up so that the kernel may read whole vectors.
inline int64_t row_map_bytes(int64_t num_nodes) {
  const int64_t blocks = (num_nodes + 511) / 512;
  return blocks * 512 + (blocks + 63) / 64 * 64;
}
inline int64_t row_dense_floats(int64_t num_nodes) {
  return 3 * ((num_nodes + 511) / 512 * 512 + 64);
}

}  // namespace nefkern::cpu
