// torch.ops.nefkern_native.kappa on CUDA tensors: arguments come checked from nefkern.ops.
#include "cuda/kappa.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "ops/checked_lists.h"
#include "ops/cuda/assemble.h"

namespace {

using torch::stable::Tensor;

// (row_offsets, columns, values, whether all indices were -1 to num_nodes - 1).
std::tuple<Tensor, Tensor, Tensor, bool> kappa(const Tensor& indices, std::optional<Tensor> weights,
                                               const Tensor& pixel_indices, double alpha,
                                               double clamp_min) {
  const nefkern::CheckedLists features("kappa", indices, weights, clamp_min);
  const nefkern::CheckedLists pixels("kappa", pixel_indices, std::nullopt, 0.0);
  STD_TORCH_CHECK(pixels.num_nodes() == features.num_nodes(),
                  "kappa: expected lists of as many nodes");
  nefkern::cuda::KappaArgs args{};
  args.num_nodes = features.num_nodes();
  args.features = features.args<nefkern::cuda::NeighbourLists>();
  args.pixels = pixels.args<nefkern::cuda::NeighbourLists>();
  args.alpha = static_cast<float>(alpha);
  return nefkern::assemble_on_gpu("kappa", features.indices(), args, nefkern::cuda::kappa_bytes,
                                  nefkern::cuda::kappa_count, nefkern::cuda::kappa_fill);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nefkern_native, CUDA, m) { m.impl("kappa", TORCH_BOX(&kappa)); }
