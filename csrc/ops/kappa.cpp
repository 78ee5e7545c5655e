// torch.ops.nefkern_native.kappa: arguments come checked from nefkern.ops.
#include "cpu/kappa.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "ops/assemble.h"
#include "ops/neighbour_lists.h"

namespace {

using torch::stable::Tensor;

// (row_offsets, columns, values, whether all indices were -1 to num_nodes - 1).
std::tuple<Tensor, Tensor, Tensor, bool> kappa(const Tensor& indices, std::optional<Tensor> weights,
                                               const Tensor& pixel_indices, double alpha,
                                               double clamp_min) {
  nefkern::ListTensors features("kappa", indices, weights, clamp_min);
  nefkern::ListTensors pixels("kappa", pixel_indices, std::nullopt, 0.0);
  const int64_t n = features.num_nodes();
  STD_TORCH_CHECK(pixels.num_nodes() == n && pixels.wide() == features.wide(),
                  "kappa: expected lists of as many nodes and of one index type");
  nefkern::RowTensors rows(indices, n, features.edges() + pixels.edges());
  Tensor scales = nefkern::large_empty(indices, {2 * n}, torch::headeronly::ScalarType::Float);
  float* scale = scales.mutable_data_ptr<float>();
  nefkern::cpu::KappaArgs args{
      .features = features.args(),
      .pixels = pixels.args(),
      .alpha = static_cast<float>(alpha),
      .workspace = rows.args(),
      .row_offsets = nullptr,
      .columns = nullptr,
      .values = nullptr,
      .scale = scale,
      .pixel_scale = scale + n,
  };
  const nefkern::cpu::Isa isa = nefkern::cpu::best_isa();
  return nefkern::assemble(indices, n, args, nefkern::cpu::kappa_count_for(isa),
                           nefkern::cpu::kappa_fill_for(isa));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nefkern_native, m) {
  m.def(
      "kappa(Tensor indices, Tensor? weights, Tensor pixel_indices, float alpha, float clamp_min) "
      "-> (Tensor, Tensor, Tensor, bool)");
}

STABLE_TORCH_LIBRARY_IMPL(nefkern_native, CPU, m) { m.impl("kappa", TORCH_BOX(&kappa)); }
