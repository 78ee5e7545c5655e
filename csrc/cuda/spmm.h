// y = kappa x for a sparse matrix in compressed rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/runtime.h"

namespace nefkern::cuda {

enum class Storage : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct SpmmArgs {
  int64_t num_nodes;           // rows of kappa, x and y; below 2^31
  int64_t num_columns;         // K, columns of x and y
  int64_t nnz;                 // entries of kappa, or places for them
  const int64_t* row_offsets;  // [num_nodes + 1], never falling, from 0 to nnz at most
  const int32_t* columns;      // [nnz]
  const float* values;         // [nnz]
  const void* x;               // [num_nodes, K], adjacent inside a row
  int64_t x_stride;            // elements from one row of x to the next
  void* y;                     // [num_nodes, K], row-major without gaps
  Storage x_storage;
  Storage y_storage;  // kFloat32 or x_storage
  void* workspace;    // of spmm_workspace()
};

// Bytes: sums of the pieces of long rows, at most K / 256 bytes an entry. Reads only the sizes.
size_t spmm_workspace(const SpmmArgs& args);

// Sums run in float32, in an order that only the graph decides. Offsets and columns are not checked
// first, which would make the host wait: offsets are clamped to 0 ... nnz, and an entry whose
// column lies outside [0, num_nodes) counts as absent. Where offsets fall, a row that seems longer
// than 2,048 entries is any numbers.
cudaError_t spmm(const SpmmArgs& args, cudaStream_t stream);

}  // namespace nefkern::cuda
