// From neighbour lists to the normalised adjacency D^(-1/2) A D^(-1/2) in compressed rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/neighbour_lists.h"
#include "cuda/runtime.h"

namespace nefkern::cuda {

struct AdjacencyArgs {
  int64_t num_nodes;  // N, below 2^31
  NeighbourLists lists;
  bool take_union;  // A = max(A, A^T) instead of (A + A^T) / 2
  int64_t merged_nodes = kMergedNodes;
  int64_t long_names = kLongNames;

  void* workspace;       // of adjacency_bytes(), kept from the first step to the second
  int sorted_half;       // of more nodes: which of its buffers the second step reads
  int64_t* row_offsets;  // [N + 1], out
  int32_t* columns;      // [row_offsets[N]], out
  float* values;         // the same
};

// The workspace: 36 bytes for every listed neighbour, 48 of more than merged_nodes. Reads only the
// sizes; the workspace is null.
cudaError_t adjacency_bytes(const AdjacencyArgs& args, size_t* bytes);
// First step: row_offsets, and nnz = row_offsets[N] so that the caller can allocate columns and
// values, or -1 if an index is neither -1 nor a node. Waits for the stream to read it.
cudaError_t adjacency_count(AdjacencyArgs& args, int64_t* nnz, cudaStream_t stream);
// Second step: columns and values.
cudaError_t adjacency_fill(const AdjacencyArgs& args, cudaStream_t stream);

}  // namespace nefkern::cuda
