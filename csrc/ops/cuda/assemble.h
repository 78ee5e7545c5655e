// The two steps of assembling a graph on a GPU; between them the host waits for one number, nnz,
// unless the caller knows how much room is enough.
#pragma once

#include <tuple>

#include "ops/cuda/stream.h"

namespace nefkern {

// (row_offsets, columns, values, whether the input was valid): bytes_of(args, &bytes) tells the
// workspace, count(args, &nnz, stream) fills args.row_offsets, fill(args, stream) the rest.
template <class Args, class BytesOf, class Count, class Fill>
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, bool>
assemble_on_gpu(const char* op, const torch::stable::Tensor& like, Args& args,
                const BytesOf& bytes_of, const Count& count, const Fill& fill) {
  using torch::headeronly::ScalarType;
  using torch::stable::Tensor;
  const OnDeviceOf device(like);
  size_t bytes = 0;
  check_cuda(op, bytes_of(args, &bytes));
  Tensor workspace = bytes_like(like, bytes);
  args.workspace = workspace.mutable_data_ptr();
  Tensor row_offsets = torch::stable::new_empty(like, {args.num_nodes + 1}, ScalarType::Long);
  args.row_offsets = row_offsets.mutable_data_ptr<int64_t>();
  int64_t nnz = 0;
  check_cuda(op, count(args, &nnz, device.stream()));
  const bool valid = nnz >= 0;
  Tensor columns = torch::stable::new_empty(like, {valid ? nnz : 0}, ScalarType::Int);
  Tensor values = torch::stable::new_empty(like, {valid ? nnz : 0}, ScalarType::Float);
  args.columns = columns.mutable_data_ptr<int32_t>();
  args.values = values.mutable_data_ptr<float>();
  if (valid) check_cuda(op, fill(args, device.stream()));
  return {row_offsets, columns, values, valid};
}

// (row_offsets, columns, values) with `room` for entries, of which row_offsets tells the used ones:
// the host waits for nothing.
template <class Args, class BytesOf, class Count, class Fill>
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
assemble_padded_on_gpu(const char* op, const torch::stable::Tensor& like, Args& args, int64_t room,
                       const BytesOf& bytes_of, const Count& count, const Fill& fill) {
  using torch::headeronly::ScalarType;
  using torch::stable::Tensor;
  const OnDeviceOf device(like);
  size_t bytes = 0;
  check_cuda(op, bytes_of(args, &bytes));
  Tensor workspace = bytes_like(like, bytes);
  args.workspace = workspace.mutable_data_ptr();
  Tensor row_offsets = torch::stable::new_empty(like, {args.num_nodes + 1}, ScalarType::Long);
  Tensor columns = torch::stable::new_empty(like, {room}, ScalarType::Int);
  Tensor values = torch::stable::new_empty(like, {room}, ScalarType::Float);
  args.row_offsets = row_offsets.mutable_data_ptr<int64_t>();
  args.columns = columns.mutable_data_ptr<int32_t>();
  args.values = values.mutable_data_ptr<float>();
  check_cuda(op, count(args, nullptr, device.stream()));
  check_cuda(op, fill(args, device.stream()));
  return {row_offsets, columns, values};
}

}  // namespace nefkern
