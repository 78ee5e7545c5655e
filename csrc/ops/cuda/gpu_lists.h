// Neighbour lists in tensors, as the CUDA graph kernels take them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cuda/neighbour_lists.h"

namespace nefkern {

// Checked lists [N, k]; keeps what args() points to alive.
class GpuLists {
 public:
  GpuLists(const char* op, const torch::stable::Tensor& indices,
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

  cuda::NeighbourLists args() const {
    return {
        .indices = index_.const_data_ptr(),
        .wide_indices = index_.scalar_type() == ScalarType::Long,
        .size = index_.size(1),
        .weights = weight_ ? weight_->const_data_ptr<float>() : nullptr,
        .clamp_min = clamp_min_,
    };
  }

 private:
  using ScalarType = torch::headeronly::ScalarType;
  torch::stable::Tensor index_;
  std::optional<torch::stable::Tensor> weight_;
  float clamp_min_;
};

}  // namespace nefkern
