// torch.ops.nefkern_native.normalized_adjacency on CUDA tensors: arguments come checked from
// nefkern.ops.
#include "cuda/normalized_adjacency.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "ops/cuda/assemble.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// (row_offsets, columns, values, whether all indices were -1 to num_nodes - 1).
std::tuple<Tensor, Tensor, Tensor, bool> normalized_adjacency(const Tensor& indices,
                                                              std::optional<Tensor> weights,
                                                              bool take_union, double clamp_min) {
  const Tensor index = torch::stable::contiguous(indices);
  const ScalarType type = index.scalar_type();
  STD_TORCH_CHECK(index.dim() == 2 && (type == ScalarType::Int || type == ScalarType::Long),
                  "normalized_adjacency: expected int32 or int64 indices [N, k]");
  std::optional<Tensor> weight;
  if (weights) {
    weight = torch::stable::contiguous(*weights);
    STD_TORCH_CHECK(weight->scalar_type() == ScalarType::Float && weight->numel() == index.numel(),
                    "normalized_adjacency: expected float32 weights of the indices' shape");
  }
  nefkern::cuda::AdjacencyArgs args{};
  args.num_nodes = index.size(0);
  args.size = index.size(1);
  args.indices = index.const_data_ptr();
  args.wide_indices = type == ScalarType::Long;
  args.weights = weight ? weight->const_data_ptr<float>() : nullptr;
  args.clamp_min = static_cast<float>(clamp_min);
  args.take_union = take_union;
  return nefkern::assemble_on_gpu("normalized_adjacency", index, args,
                                  nefkern::cuda::adjacency_bytes, nefkern::cuda::adjacency_count,
                                  nefkern::cuda::adjacency_fill);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nefkern_native, CUDA, m) {
  m.impl("normalized_adjacency", TORCH_BOX(&normalized_adjacency));
}
