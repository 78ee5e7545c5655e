// Scalar products of rows at a sparse matrix's places: values_ij = x_i . y_j.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace nefkern::cpu {

struct SddmmArgs {
  int64_t num_nodes;           // rows of the matrix, x and y
  int64_t num_columns;         // K, columns of x and y
  const int64_t* row_offsets;  // [num_nodes + 1], never falling, from 0 to nnz
  const int32_t* columns;      // [nnz], in any order
  const float* x;              // [num_nodes, K], row-major without gaps
  const float* y;              // [num_nodes, K], row-major without gaps
  float* values;               // [nnz]
};

// Sums run in an order that depends on K alone: x_i . y_j and y_j . x_i are equal to the last bit.
// False if a column lies outside [0, num_nodes): nothing is read there, values are of no use.
NEFKERN_DECLARE(bool, sddmm, (const SddmmArgs& args));

}  // namespace nefkern::cpu
