// From neighbour lists to the normalised adjacency D^(-1/2) A D^(-1/2) in compressed rows.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace nefkern::cpu {

// One edge of the transposed lists: `row` lists the node whose edges these are.
struct IncomingEdge {
  int32_t row;
  float weight;
};

struct AdjacencyArgs {
  int64_t num_nodes;     // N
  int64_t list_size;     // k
  const void* indices;   // [N, k] int32 or int64: -1 (padding) to N - 1
  bool wide_indices;     // int64
  const float* weights;  // [N, k], or null for weight 1
  float clamp_min;       // at least 0
  bool take_union;       // A = max(A, A^T) instead of (A + A^T) / 2

  int64_t parts;  // the lists are split in so many; at least 1
  // Workspaces. Cursors: [parts, N]; offsets: [N + 1]; incoming: [N k].
  int64_t* cursors;
  int64_t* incoming_offsets;
  IncomingEdge* incoming;
  // For each of `workers` threads: adjacency_dense_floats(N) and adjacency_map_bytes(N).
  int64_t workers;
  float* dense;
  uint8_t* maps;

  int64_t* row_offsets;  // [N + 1], out
  int32_t* columns;      // [row_offsets[N]], out
  float* values;         // the same
  float* scale;          // [N], workspace of the second step
};

// A worker's workspaces, rounded up so that the kernel may read whole vectors.
inline int64_t adjacency_map_bytes(int64_t num_nodes) {
  const int64_t blocks = (num_nodes + 511) / 512;
  return blocks * 512 + (blocks + 63) / 64 * 64;
}
inline int64_t adjacency_dense_floats(int64_t num_nodes) {
  return 3 * ((num_nodes + 511) / 512 * 512 + 64);
}

// First step: fills the incoming edges and row_offsets, so that the caller can allocate columns and
// values. False if an index is neither -1 nor a node.
NEFKERN_DECLARE(bool, adjacency_count, (const AdjacencyArgs& args));
// Second step: fills columns and values.
NEFKERN_DECLARE(void, adjacency_fill, (const AdjacencyArgs& args));

}  // namespace nefkern::cpu
