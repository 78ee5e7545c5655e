// y = kappa x for a sparse matrix in compressed rows.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace nefkern::cpu {

enum class Storage : int { kFloat32 = 0, kBFloat16 = 1 };

struct SpmmArgs {
  int64_t num_nodes;           // rows of kappa, x and y
  int64_t num_columns;         // K, columns of x and y
  const int64_t* row_offsets;  // [num_nodes + 1], never falling, from 0 to nnz
  const int32_t* columns;      // [nnz]
  const float* values;         // [nnz]
  const void* x;               // [num_nodes, K], row-major without gaps
  void* y;                     // [num_nodes, K], row-major without gaps
  Storage x_storage, y_storage;
};

// Sums run in float32, in the order of a row's entries: the result doesn't depend on threads.
// False if a column lies outside [0, num_nodes): nothing is read there and y is of no use.
NEFKERN_DECLARE(bool, spmm, (const SpmmArgs& args));

}  // namespace nefkern::cpu
