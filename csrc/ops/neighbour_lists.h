// Neighbour lists and row workspaces in tensors, as the graph kernels take them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "cpu/neighbour_lists.h"
#include "cpu/parallel.h"
#include "ops/checked_lists.h"
#include "ops/large_empty.h"

namespace nefkern {

// Checked lists [N, k] and the memory of their transposition.
class ListTensors : public CheckedLists {
 public:
  ListTensors(const char* op, const torch::stable::Tensor& indices,
              const std::optional<torch::stable::Tensor>& weights, double clamp_min)
      : CheckedLists(op, indices, weights, clamp_min),
        incoming_offsets_(large_empty(indices, {num_nodes() + 1}, ScalarType::Long)),
        incoming_(large_empty(indices, {edges()}, ScalarType::Long)) {
    static_assert(sizeof(cpu::IncomingEdge) == sizeof(int64_t));
  }

  cpu::NeighbourLists args() {
    cpu::NeighbourLists lists = CheckedLists::args<cpu::NeighbourLists>();
    lists.incoming_offsets = incoming_offsets_.mutable_data_ptr<int64_t>();
    lists.incoming = static_cast<cpu::IncomingEdge*>(incoming_.mutable_data_ptr());
    return lists;
  }

 private:
  torch::stable::Tensor incoming_offsets_, incoming_;
};

// The memory that rows are assembled in, for as many threads as `edges` edges are worth.
class RowTensors {
 public:
  RowTensors(const torch::stable::Tensor& like, int64_t num_nodes, int64_t edges)
      : num_nodes_(num_nodes), workers_(std::min(cpu::num_threads(), edges / kEdgesAThread + 1)) {
    cursors_ = large_empty(like, {workers_ * num_nodes}, ScalarType::Long);
    dense_ = large_empty(like, {workers_ * cpu::row_dense_floats(num_nodes)}, ScalarType::Float);
    maps_ = large_empty(like, {workers_ * cpu::row_map_bytes(num_nodes)}, ScalarType::Byte);
  }

  cpu::RowWorkspace args() {
    return {
        .num_nodes = num_nodes_,
        .workers = workers_,
        .cursors = cursors_.mutable_data_ptr<int64_t>(),
        .dense = dense_.mutable_data_ptr<float>(),
        .maps = maps_.mutable_data_ptr<uint8_t>(),
    };
  }

 private:
  using ScalarType = torch::headeronly::ScalarType;
  static constexpr int64_t kEdgesAThread = 16384;  // smaller lists are not worth a second thread
  int64_t num_nodes_, workers_;
  torch::stable::Tensor cursors_, dense_, maps_;
};

}  // namespace nefkern
