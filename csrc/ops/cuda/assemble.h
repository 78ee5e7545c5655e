// The two steps of assembling a graph on a GPU; between them the host waits for one number, nnz,
// unless the caller knows how much room is enough.
#pragma once

#include <tuple>

#include "ops/cuda/stream.h"

namespace nefkern {

// A graph in the making on a GPU: its row offsets and the workspace of the assembly, then the room
// of its entries; args points to all of them.
template <class Args>
class Assembly {
 public:
  // bytes_of(args, &bytes) tells the workspace.
  template <class BytesOf>
  Assembly(const char* op, const torch::stable::Tensor& like, Args& args, const BytesOf& bytes_of)
      : like_(like), args_(args) {
    size_t bytes = 0;
    check_cuda(op, bytes_of(args, &bytes));
    workspace_ = bytes_like(like, bytes);
    args.workspace = workspace_.mutable_data_ptr();
    row_offsets =
        torch::stable::new_empty(like, {args.num_nodes + 1}, torch::headeronly::ScalarType::Long);
    args.row_offsets = row_offsets.template mutable_data_ptr<int64_t>();
  }

  void make_room(int64_t entries) {
    columns = torch::stable::new_empty(like_, {entries}, torch::headeronly::ScalarType::Int);
    values = torch::stable::new_empty(like_, {entries}, torch::headeronly::ScalarType::Float);
    args_.columns = columns.template mutable_data_ptr<int32_t>();
    args_.values = values.template mutable_data_ptr<float>();
  }

  torch::stable::Tensor row_offsets, columns, values;

 private:
  const torch::stable::Tensor& like_;
  Args& args_;
  torch::stable::Tensor workspace_;
};

// (row_offsets, columns, values, whether the input was valid): count(args, &nnz, stream) fills
// args.row_offsets, fill(args, stream) the rest.
template <class Args, class BytesOf, class Count, class Fill>
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, bool>
assemble_on_gpu(const char* op, const torch::stable::Tensor& like, Args& args,
                const BytesOf& bytes_of, const Count& count, const Fill& fill) {
  const OnDeviceOf device(like);
  Assembly<Args> graph(op, like, args, bytes_of);
  int64_t nnz = 0;
  check_cuda(op, count(args, &nnz, device.stream()));
  const bool valid = nnz >= 0;
  graph.make_room(valid ? nnz : 0);
  if (valid) check_cuda(op, fill(args, device.stream()));
  return {graph.row_offsets, graph.columns, graph.values, valid};
}

// (row_offsets, columns, values) with `room` for entries, of which row_offsets tells the used ones:
// the host waits for nothing.
template <class Args, class BytesOf, class Count, class Fill>
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
assemble_padded_on_gpu(const char* op, const torch::stable::Tensor& like, Args& args, int64_t room,
                       const BytesOf& bytes_of, const Count& count, const Fill& fill) {
  const OnDeviceOf device(like);
  Assembly<Args> graph(op, like, args, bytes_of);
  graph.make_room(room);
  check_cuda(op, count(args, nullptr, device.stream()));
  check_cuda(op, fill(args, device.stream()));
  return {graph.row_offsets, graph.columns, graph.values};
}

}  // namespace nefkern
