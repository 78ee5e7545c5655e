// Neighbour lists and row workspaces in tensors, as the graph kernels take them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "cpu/neighbour_lists.h"
#include "cpu/parallel.h"
#include "ops/large_empty.h"

namespace nefkern {

// Checked lists [N, k] and the memory of their transposition; keeps what args() points to alive.
class ListTensors {
 public:
  ListTensors(const torch::stable::Tensor& indices,
              const std::optional<torch::stable::Tensor>& weights, double clamp_min)
      : index_(torch::stable::contiguous(indices)), clamp_min_(static_cast<float>(clamp_min)) {
    const ScalarType type = index_.scalar_type();
    STD_TORCH_CHECK(index_.dim() == 2 && (type == ScalarType::Int || type == ScalarType::Long),
                    "neighbour lists: expected int32 or int64 indices [N, k]");
    if (weights) {
      weight_ = torch::stable::contiguous(*weights);
      STD_TORCH_CHECK(
          weight_->scalar_type() == ScalarType::Float && weight_->numel() == index_.numel(),
          "neighbour lists: expected float32 weights of the indices' shape");
    }
    incoming_offsets_ = large_empty(index_, {num_nodes() + 1}, ScalarType::Long);
    static_assert(sizeof(cpu::IncomingEdge) == sizeof(int64_t));
    incoming_ = large_empty(index_, {edges()}, ScalarType::Long);
  }

  const torch::stable::Tensor& indices() const { return index_; }
  int64_t num_nodes() const { return index_.size(0); }
  int64_t edges() const { return index_.numel(); }
  bool wide() const { return index_.scalar_type() == ScalarType::Long; }

  cpu::NeighbourLists args() {
    return {
        .size = index_.size(1),
        .indices = index_.const_data_ptr(),
        .wide_indices = wide(),
        .weights = weight_ ? weight_->const_data_ptr<float>() : nullptr,
        .clamp_min = clamp_min_,
        .incoming_offsets = incoming_offsets_.mutable_data_ptr<int64_t>(),
        .incoming = static_cast<cpu::IncomingEdge*>(incoming_.mutable_data_ptr()),
    };
  }

 private:
  using ScalarType = torch::headeronly::ScalarType;
  torch::stable::Tensor index_;
  std::optional<torch::stable::Tensor> weight_;
  torch::stable::Tensor incoming_offsets_, incoming_;
  float clamp_min_;
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

// A graph in two steps, (row_offsets, columns, values, valid): count(args) fills args.row_offsets
// and says whether the lists were valid, fill(args) the rest.
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
