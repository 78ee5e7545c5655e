// From the neighbour lists of both graphs straight to kappa (eq 4): neither graph is written out,
// and the host waits once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/neighbour_lists.h"
#include "cuda/runtime.h"

namespace nefkern::cuda {

struct KappaArgs {
  int64_t num_nodes;        // N, below 2^31
  NeighbourLists features;  // symmetrised by (A + A^T) / 2
  NeighbourLists pixels;    // without weights, symmetrised by or
  float alpha;
  int64_t merged_nodes = kMergedNodes;
  int64_t long_names = kLongNames;

  void* workspace;       // of kappa_bytes(), kept from the first step to the second
  int sorted_half;       // of more nodes: which of its buffers the second step reads
  int64_t* row_offsets;  // [N + 1], out
  int32_t* columns;      // [row_offsets[N]], out
  float* values;         // the same
};

// The workspace: 36 bytes for every listed neighbour, 48 of more than merged_nodes. Reads only the
// sizes; the workspace is null.
cudaError_t kappa_bytes(const KappaArgs& args, size_t* bytes);
// First step: row_offsets, and nnz = row_offsets[N] so that the caller can allocate columns and
// values, or -1 if an index is neither -1 nor a node. Waits for the stream to read it.
// With nnz null nothing is read and nobody waits: columns and values then need room for
// kappa_room() entries, and an index that is no node counts as -1.
cudaError_t kappa_count(KappaArgs& args, int64_t* nnz, cudaStream_t stream);
// The most entries there can be: two for every listed neighbour.
constexpr int64_t kappa_room(const KappaArgs& args) {
  return 2 * args.num_nodes * (args.features.size + args.pixels.size);
}
// Second step: columns and values.
cudaError_t kappa_fill(const KappaArgs& args, cudaStream_t stream);

}  // namespace nefkern::cuda
