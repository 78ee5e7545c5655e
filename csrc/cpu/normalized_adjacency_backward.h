// From the gradient of a graph's values to that of the weights of the lists it was made of, the
// structure held fixed: of normalized_adjacency's graph, or of kappa's, which has more places.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/neighbour_lists.h"

namespace nefkern::cpu {

// A stored place (i, j): what there is to know of it before its transposed place is looked at, in
// one piece, because that one is far away.
struct StoredPlace {
  float weight;    // the largest that i's list gives j, 0 if none
  int32_t times;   // that it is listed
  float gradient;  // of the value
  int32_t column;  // j
};

// And afterwards.
struct MergedPlace {
  double entry;     // a_ij
  float symmetric;  // H_ij, the symmetric part of the gradient
  int32_t sharers;  // edges of i's list that a_ij's gradient is shared by; 0 if there are none
};

struct AdjacencyBackwardArgs {
  NeighbourLists lists;  // without its workspaces
  bool take_union;       // A = max(A, A^T) instead of (A + A^T) / 2
  int64_t num_nodes;     // N
  // The graph, of symmetric structure, and the gradient of its values.
  const int64_t* row_offsets;  // [N + 1], from 0 to nnz, never falling
  const int32_t* columns;      // [nnz], ascending in a row
  const float* gradient;       // [nnz]
  // Workspaces.
  int64_t workers;          // threads; the rows are split in as many parts
  int64_t* cursors;         // [workers, N]
  int32_t* local;           // [workers, N]
  StoredPlace* stored;      // [nnz]
  MergedPlace* merged;      // [nnz]
  double* scale;            // [N]: d^(-1/2)
  double* pull;             // [N]
  float* weights_gradient;  // [N, k], out
};

// False if the lists or the graph contradict themselves or each other.
NEFKERN_DECLARE(bool, adjacency_backward, (const AdjacencyBackwardArgs& args));

}  // namespace nefkern::cpu
