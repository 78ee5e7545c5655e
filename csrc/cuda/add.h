// c = a + alpha b for two sparse matrices in compressed rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/runtime.h"

namespace nefkern::cuda {

struct SparseRows {
  const int64_t* row_offsets;  // [num_nodes + 1]
  const int32_t* columns;      // [nnz], ascending inside a row, without repetition
  const float* values;
  int64_t nnz;
};

struct AddArgs {
  int64_t num_nodes;  // below 2^31
  SparseRows a, b;
  float alpha;
  void* workspace;       // of add_bytes()
  int64_t* row_offsets;  // [num_nodes + 1], out
  int32_t* columns;      // [row_offsets[num_nodes]], out
  float* values;         // the same
};

// The workspace of the first step. Reads only num_nodes; the workspace is null.
cudaError_t add_bytes(const AddArgs& args, size_t* bytes);
// First step: row_offsets, and nnz so that the caller can allocate columns and values, or -1 if a
// graph's offsets fall or do not go from 0 to its nnz, or its columns are not ascending nodes.
// Waits for the stream to read it.
cudaError_t add_count(const AddArgs& args, int64_t* nnz, cudaStream_t stream);
// Second step: columns and values.
cudaError_t add_fill(const AddArgs& args, cudaStream_t stream);

}  // namespace nefkern::cuda
