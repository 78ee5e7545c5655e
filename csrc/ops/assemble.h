// The two steps of assembling a graph on the processor.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "ops/large_empty.h"

namespace nefkern {

// (row_offsets, columns, values, whether the input was valid): count(args) fills args.row_offsets
// and says whether it was, fill(args) the rest.
template <class Args, class Count, class Fill>
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, bool> assemble(
    const torch::stable::Tensor& like, int64_t num_nodes, Args& args, const Count& count,
    const Fill& fill) {
  using torch::headeronly::ScalarType;
  torch::stable::Tensor row_offsets = large_empty(like, {num_nodes + 1}, ScalarType::Long);
  args.row_offsets = row_offsets.mutable_data_ptr<int64_t>();
  const bool valid = count(args);
  const int64_t nnz = valid ? args.row_offsets[num_nodes] : 0;
  torch::stable::Tensor columns = large_empty(like, {nnz}, ScalarType::Int);
  torch::stable::Tensor values = large_empty(like, {nnz}, ScalarType::Float);
  args.columns = columns.mutable_data_ptr<int32_t>();
  args.values = values.mutable_data_ptr<float>();
  if (valid) fill(args);
  return {row_offsets, columns, values, valid};
}

}  // namespace nefkern
