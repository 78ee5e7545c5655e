// torch.ops.nefkern_native.normalized_adjacency: arguments come checked from nefkern.ops.
#include "cpu/normalized_adjacency.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "ops/assemble.h"
#include "ops/neighbour_lists.h"

namespace {

using torch::stable::Tensor;

// (row_offsets, columns, values, whether all indices were -1 to num_nodes - 1).
std::tuple<Tensor, Tensor, Tensor, bool> normalized_adjacency(const Tensor& indices,
                                                              std::optional<Tensor> weights,
                                                              bool take_union, double clamp_min) {
  nefkern::ListTensors lists("normalized_adjacency", indices, weights, clamp_min);
  const int64_t n = lists.num_nodes();
  nefkern::RowTensors rows(indices, n, lists.edges());
  Tensor scale = nefkern::large_empty(indices, {n}, torch::headeronly::ScalarType::Float);
  nefkern::cpu::AdjacencyArgs args{
      .lists = lists.args(),
      .take_union = take_union,
      .workspace = rows.args(),
      .row_offsets = nullptr,
      .columns = nullptr,
      .values = nullptr,
      .scale = scale.mutable_data_ptr<float>(),
  };
  const nefkern::cpu::Isa isa = nefkern::cpu::best_isa();
  return nefkern::assemble(indices, n, args, nefkern::cpu::adjacency_count_for(isa),
                           nefkern::cpu::adjacency_fill_for(isa));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nefkern_native, m) {
  m.def(
      "normalized_adjacency(Tensor indices, Tensor? weights, bool take_union, float clamp_min) -> "
      "(Tensor, Tensor, Tensor, bool)");
}

STABLE_TORCH_LIBRARY_IMPL(nefkern_native, CPU, m) {
  m.impl("normalized_adjacency", TORCH_BOX(&normalized_adjacency));
}
