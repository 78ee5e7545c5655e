// What the glue of the graph operators checks before a kernel follows a graph's offsets.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

namespace nefkern {

inline bool is_csr(const torch::stable::Tensor& offsets, const torch::stable::Tensor& columns,
                   const torch::stable::Tensor& values) {
  using torch::headeronly::ScalarType;
  return offsets.scalar_type() == ScalarType::Long && columns.scalar_type() == ScalarType::Int &&
         values.scalar_type() == ScalarType::Float && offsets.numel() >= 1 &&
         columns.numel() == values.numel();
}

// Whether the offsets go from 0 to nnz and never fall.
inline bool never_falls(const torch::stable::Tensor& offsets, int64_t nnz) {
  const int64_t* data = offsets.const_data_ptr<int64_t>();
  const int64_t last = offsets.numel() - 1;
  bool good = data[0] == 0 && data[last] == nnz;
  for (int64_t i = 0; i < last; ++i) good &= data[i] <= data[i + 1];
  return good;
}

// Whether every column is one of a graph's nodes.
inline bool below(const torch::stable::Tensor& columns, int64_t num_nodes) {
  const int32_t* data = columns.const_data_ptr<int32_t>();
  const int64_t count = columns.numel();
  uint32_t worst = 0;  // unsigned, a negative one is large
  for (int64_t i = 0; i < count; ++i) worst = std::max(worst, static_cast<uint32_t>(data[i]));
  return count == 0 || static_cast<int64_t>(worst) < num_nodes;
}

}  // namespace nefkern
