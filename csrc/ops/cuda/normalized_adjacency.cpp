// torch.ops.nefkern_native.normalized_adjacency on CUDA tensors: arguments come checked from
// nefkern.ops.
#include "cuda/normalized_adjacency.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "ops/checked_lists.h"
#include "ops/cuda/assemble.h"

namespace {

using torch::stable::Tensor;

// (row_offsets, columns, values, whether all indices were -1 to num_nodes - 1).
std::tuple<Tensor, Tensor, Tensor, bool> normalized_adjacency(const Tensor& indices,
                                                              std::optional<Tensor> weights,
                                                              bool take_union, double clamp_min) {
  const nefkern::CheckedLists lists("normalized_adjacency", indices, weights, clamp_min);
  nefkern::cuda::AdjacencyArgs args{};
  args.num_nodes = lists.num_nodes();
  args.lists = lists.args<nefkern::cuda::NeighbourLists>();
  args.take_union = take_union;
  return nefkern::assemble_on_gpu("normalized_adjacency", lists.indices(), args,
                                  nefkern::cuda::adjacency_bytes, nefkern::cuda::adjacency_count,
                                  nefkern::cuda::adjacency_fill);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nefkern_native, CUDA, m) {
  m.impl("normalized_adjacency", TORCH_BOX(&normalized_adjacency));
}
