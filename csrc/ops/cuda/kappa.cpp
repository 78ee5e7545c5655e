// torch.ops.nefkern_native.kappa and kappa_padded on CUDA tensors: arguments come checked from
// nefkern.ops.
#include "cuda/kappa.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "ops/checked_lists.h"
#include "ops/cuda/assemble.h"

namespace {

using torch::stable::Tensor;

// The lists of both graphs, checked; keeps what args points to alive.
struct BothLists {
  nefkern::CheckedLists features, pixels;
  nefkern::cuda::KappaArgs args{};

  BothLists(const Tensor& indices, const std::optional<Tensor>& weights,
            const Tensor& pixel_indices, double alpha, double clamp_min)
      : features("kappa", indices, weights, clamp_min),
        pixels("kappa", pixel_indices, std::nullopt, 0.0) {
    STD_TORCH_CHECK(pixels.num_nodes() == features.num_nodes(),
                    "kappa: expected lists of as many nodes");
    args.num_nodes = features.num_nodes();
    args.features = features.args<nefkern::cuda::NeighbourLists>();
    args.pixels = pixels.args<nefkern::cuda::NeighbourLists>();
    args.alpha = static_cast<float>(alpha);
  }
};

// (row_offsets, columns, values, whether all indices were -1 to num_nodes - 1).
std::tuple<Tensor, Tensor, Tensor, bool> kappa(const Tensor& indices, std::optional<Tensor> weights,
                                               const Tensor& pixel_indices, double alpha,
                                               double clamp_min) {
  BothLists lists(indices, weights, pixel_indices, alpha, clamp_min);
  return nefkern::assemble_on_gpu("kappa", lists.features.indices(), lists.args,
                                  nefkern::cuda::kappa_bytes, nefkern::cuda::kappa_count,
                                  nefkern::cuda::kappa_fill);
}

// (row_offsets, columns, values), the last two with room for two entries a listed neighbour.
std::tuple<Tensor, Tensor, Tensor> kappa_padded(const Tensor& indices,
                                                std::optional<Tensor> weights,
                                                const Tensor& pixel_indices, double alpha,
                                                double clamp_min) {
  BothLists lists(indices, weights, pixel_indices, alpha, clamp_min);
  return nefkern::assemble_padded_on_gpu(
      "kappa_padded", lists.features.indices(), lists.args, nefkern::cuda::kappa_room(lists.args),
      nefkern::cuda::kappa_bytes, nefkern::cuda::kappa_count, nefkern::cuda::kappa_fill);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nefkern_native, m) {
  m.def(
      "kappa_padded(Tensor indices, Tensor? weights, Tensor pixel_indices, float alpha, "
      "float clamp_min) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(nefkern_native, CUDA, m) {
  m.impl("kappa", TORCH_BOX(&kappa));
  m.impl("kappa_padded", TORCH_BOX(&kappa_padded));
}
