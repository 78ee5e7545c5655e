// From neighbour lists to the normalised adjacency D^(-1/2) A D^(-1/2) in compressed rows.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/neighbour_lists.h"

namespace nefkern::cpu {

struct AdjacencyArgs {
  NeighbourLists lists;
  bool take_union;  // A = max(A, A^T) instead of (A + A^T) / 2
  RowWorkspace workspace;

  int64_t* row_offsets;  // [N + 1], out
  int32_t* columns;      // [row_offsets[N]], out
  float* values;         // the same
  float* scale;          // [N], workspace of the second step
};

// First step: fills the incoming edges and row_offsets, so that the caller can allocate columns and
// values. False if an index is neither -1 nor a node.
NEFKERN_DECLARE(bool, adjacency_count, (const AdjacencyArgs& args));
// Second step: fills columns and values.
NEFKERN_DECLARE(void, adjacency_fill, (const AdjacencyArgs& args));

}  // namespace nefkern::cpu
