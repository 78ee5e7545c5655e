// Uninitialised tensors for results of some megabytes.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>

#include "cpu/pages.h"

namespace nefkern {

inline torch::stable::Tensor large_empty(const torch::stable::Tensor& like,
                                         std::initializer_list<int64_t> shape,
                                         torch::headeronly::ScalarType type) {
  torch::stable::Tensor tensor = torch::stable::new_empty(like, shape, type);
  cpu::prefer_huge_pages(tensor.mutable_data_ptr(),
                         static_cast<size_t>(tensor.numel()) * tensor.element_size());
  return tensor;
}

}  // namespace nefkern
