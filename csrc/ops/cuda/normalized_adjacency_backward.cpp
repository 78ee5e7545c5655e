// torch.ops.nefkern_native.normalized_adjacency_backward on CUDA tensors: arguments come checked
// from nefkern.ops; shapes are checked again because a wrong one would be read out of bounds.
#include "cuda/normalized_adjacency_backward.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/checked_lists.h"
#include "ops/csr_checks.h"
#include "ops/cuda/stream.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The gradient of the lists' weights, float32 [N, k]; and true: what lists and graph say is not
// looked at first, since the host would have to wait for the answer.
std::tuple<Tensor, bool> normalized_adjacency_backward(const Tensor& grad, const Tensor& indices,
                                                       const Tensor& weights,
                                                       const Tensor& row_offsets,
                                                       const Tensor& columns, bool take_union,
                                                       double clamp_min) {
  constexpr auto kName = "normalized_adjacency_backward";
  const nefkern::CheckedLists lists(kName, indices, weights, clamp_min);
  const Tensor offsets = torch::stable::contiguous(row_offsets);
  const Tensor column = torch::stable::contiguous(columns);
  const Tensor gradient = torch::stable::contiguous(grad);
  STD_TORCH_CHECK(
      nefkern::is_csr(offsets, column, gradient) && offsets.numel() == lists.num_nodes() + 1, kName,
      ": expected a graph with as many rows as the lists, and a float32 gradient");
  const nefkern::OnDeviceOf device(gradient);
  Tensor found = torch::stable::new_empty(gradient, {lists.num_nodes(), lists.indices().size(1)},
                                          ScalarType::Float);
  nefkern::cuda::AdjacencyBackwardArgs args{
      .num_nodes = lists.num_nodes(),
      .nnz = column.numel(),
      .lists = lists.args<nefkern::cuda::NeighbourLists>(),
      .take_union = take_union,
      .row_offsets = offsets.const_data_ptr<int64_t>(),
      .columns = column.const_data_ptr<int32_t>(),
      .gradient = gradient.const_data_ptr<float>(),
      .workspace = nullptr,
      .weights_gradient = found.mutable_data_ptr<float>(),
  };
  const Tensor workspace =
      nefkern::bytes_like(gradient, nefkern::cuda::adjacency_backward_bytes(args));
  args.workspace = workspace.mutable_data_ptr();
  nefkern::check_cuda(kName, nefkern::cuda::adjacency_backward(args, device.stream()));
  return {found, true};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nefkern_native, CUDA, m) {
  m.impl("normalized_adjacency_backward", TORCH_BOX(&normalized_adjacency_backward));
}
