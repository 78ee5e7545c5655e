// c = a + alpha b for two sparse matrices in compressed rows.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace nefkern::cpu {

struct SparseRows {
  const int64_t* row_offsets;  // [num_nodes + 1]
  const int32_t* columns;      // ascending inside a row
  const float* values;
};

struct AddArgs {
  int64_t num_nodes;
  SparseRows a, b;
  float alpha;
  int64_t* row_offsets;  // [num_nodes + 1], out
  int32_t* columns;      // [row_offsets[num_nodes]], out
  float* values;         // the same
};

// First step: row_offsets, so that the caller can allocate columns and values.
NEFKERN_DECLARE(void, add_count, (const AddArgs& args));
// Second step: columns and values.
NEFKERN_DECLARE(void, add_fill, (const AddArgs& args));

// The gradient of one of the two: that of the sum, at the places that the matrix has of it.
struct AddBackwardArgs {
  int64_t num_nodes;
  SparseRows sum;              // its values: the gradient
  const int64_t* row_offsets;  // of the matrix
  const int32_t* columns;
  float* values;  // as many as there are columns, out
};

// False if the sum lacks a place.
NEFKERN_DECLARE(bool, add_backward, (const AddBackwardArgs& args));

}  // namespace nefkern::cpu
