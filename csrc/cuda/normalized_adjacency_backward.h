// From the gradient of a graph's values to that of the weights of the lists it was made of, the
// structure held fixed: of normalized_adjacency's graph, or of kappa's, which has more places.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/neighbour_lists.h"
#include "cuda/runtime.h"

namespace nefkern::cuda {

struct AdjacencyBackwardArgs {
  int64_t num_nodes;     // N, below 2^31
  int64_t nnz;           // entries of the graph
  NeighbourLists lists;  // with weights
  bool take_union;       // A = max(A, A^T) instead of (A + A^T) / 2
  // The graph, of symmetric structure, and the gradient of its values.
  const int64_t* row_offsets;  // [N + 1], never falling, from 0 to nnz
  const int32_t* columns;      // [nnz], ascending in a row
  const float* gradient;       // [nnz]
  void* workspace;             // of adjacency_backward_bytes()
  float* weights_gradient;     // [N, k], out
};

// Bytes: 24 an entry, 4 a listed neighbour, 16 a node. Reads only the sizes.
size_t adjacency_backward_bytes(const AdjacencyBackwardArgs& args);

// Sums run in double, in an order that only the graph decides: the same bits every time. Lists and
// graph are not checked first, which would make the host wait; nothing is read or written out of
// bounds, and an edge that the graph does not store has the gradient NaN.
cudaError_t adjacency_backward(const AdjacencyBackwardArgs& args, cudaStream_t stream);

}  // namespace nefkern::cuda
