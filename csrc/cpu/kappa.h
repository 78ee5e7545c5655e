// From the neighbour lists of both graphs straight to kappa (eq 4): neither graph is written out.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/neighbour_lists.h"

namespace nefkern::cpu {

struct KappaArgs {
  NeighbourLists features;  // symmetrised by (A + A^T) / 2
  NeighbourLists pixels;    // of the same index type, without weights, symmetrised by or
  float alpha;
  RowWorkspace workspace;

  int64_t* row_offsets;  // [N + 1], out
  int32_t* columns;      // [row_offsets[N]], out
  float* values;         // the same
  float* scale;          // [N] twice, workspaces of the second step: d^(-1/2) of either graph
  float* pixel_scale;
};

// First step: fills the incoming edges and row_offsets, so that the caller can allocate columns and
// values. False if an index is neither -1 nor a node.
NEFKERN_DECLARE(bool, kappa_count, (const KappaArgs& args));
// Second step: fills columns and values.
NEFKERN_DECLARE(void, kappa_fill, (const KappaArgs& args));

}  // namespace nefkern::cpu
