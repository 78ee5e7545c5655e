// Neighbour lists in tensors, as far as the kernels of processor and GPU take them alike.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace nefkern {

// Checked lists [N, k]; keeps what args() points to alive.
class CheckedLists {
 public:
  CheckedLists(const char* op, const torch::stable::Tensor& indices,
               const std::optional<torch::stable::Tensor>& weights, double clamp_min)
      : index_(torch::stable::contiguous(indices)), clamp_min_(static_cast<float>(clamp_min)) {
    const ScalarType type = index_.scalar_type();
    STD_TORCH_CHECK(index_.dim() == 2 && (type == ScalarType::Int || type == ScalarType::Long), op,
                    ": expected int32 or int64 indices [N, k]");
    if (!weights) return;
    weight_ = torch::stable::contiguous(*weights);
    STD_TORCH_CHECK(
        weight_->scalar_type() == ScalarType::Float && weight_->numel() == index_.numel(), op,
        ": expected float32 weights of the indices' shape");
  }

  const torch::stable::Tensor& indices() const { return index_; }
  int64_t num_nodes() const { return index_.size(0); }
  int64_t edges() const { return index_.numel(); }
  bool wide() const { return index_.scalar_type() == ScalarType::Long; }

  // `Lists`: cpu::NeighbourLists, whose workspaces are left null, or cuda::NeighbourLists.
  template <class Lists>
  Lists args() const {
    Lists lists{};
    lists.size = index_.size(1);
    lists.indices = index_.const_data_ptr();
    lists.wide_indices = wide();
    lists.weights = weight_ ? weight_->const_data_ptr<float>() : nullptr;
    lists.clamp_min = clamp_min_;
    return lists;
  }

 protected:
  using ScalarType = torch::headeronly::ScalarType;

 private:
  torch::stable::Tensor index_;
  std::optional<torch::stable::Tensor> weight_;
  float clamp_min_;
};

}  // namespace nefkern
