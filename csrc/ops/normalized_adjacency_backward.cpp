// torch.ops.nefkern_native.normalized_adjacency_backward: arguments come checked from nefkern.ops;
// what would be read or written out of bounds is checked again.
#include "cpu/normalized_adjacency_backward.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>

#include "cpu/parallel.h"
#include "ops/checked_lists.h"
#include "ops/csr_checks.h"
#include "ops/large_empty.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// grad float32 [nnz], of the values of a graph -> that of the lists' weights, float32 [N, k], and
// whether lists and graph made sense.
std::tuple<Tensor, bool> normalized_adjacency_backward(const Tensor& grad, const Tensor& indices,
                                                       const Tensor& weights,
                                                       const Tensor& row_offsets,
                                                       const Tensor& columns, bool take_union,
                                                       double clamp_min) {
  constexpr int64_t kEdgesAThread = 16384;  // smaller lists are not worth a second thread
  constexpr auto kName = "normalized_adjacency_backward";
  const nefkern::CheckedLists lists(kName, indices, weights, clamp_min);
  const Tensor offsets = torch::stable::contiguous(row_offsets);
  const Tensor column = torch::stable::contiguous(columns);
  const Tensor gradient = torch::stable::contiguous(grad);
  const int64_t n = lists.num_nodes(), nnz = column.numel();
  STD_TORCH_CHECK(nefkern::is_csr(offsets, column, gradient) && offsets.numel() == n + 1, kName,
                  ": expected a graph with as many rows as the lists, and a float32 gradient");
  const int64_t workers = std::min(nefkern::cpu::num_threads(), lists.edges() / kEdgesAThread + 1);
  const auto empty = [&](int64_t count, ScalarType type) {
    return nefkern::large_empty(gradient, {count}, type);
  };
  Tensor found = nefkern::large_empty(gradient, {n, lists.indices().size(1)}, ScalarType::Float);
  if (!nefkern::never_falls(offsets, nnz)) return {found, false};
  Tensor cursors = empty(workers * n, ScalarType::Long),
         local = empty(workers * n, ScalarType::Int);
  Tensor stored = empty(2 * nnz, ScalarType::Long), merged = empty(2 * nnz, ScalarType::Long);
  Tensor sums = empty(2 * n, ScalarType::Double);
  static_assert(sizeof(nefkern::cpu::StoredPlace) == 2 * sizeof(int64_t) &&
                sizeof(nefkern::cpu::MergedPlace) == 2 * sizeof(int64_t));
  double* scale = sums.mutable_data_ptr<double>();
  const nefkern::cpu::AdjacencyBackwardArgs args{
      .lists = lists.args<nefkern::cpu::NeighbourLists>(),
      .take_union = take_union,
      .num_nodes = n,
      .row_offsets = offsets.const_data_ptr<int64_t>(),
      .columns = column.const_data_ptr<int32_t>(),
      .gradient = gradient.const_data_ptr<float>(),
      .workers = workers,
      .cursors = cursors.mutable_data_ptr<int64_t>(),
      .local = local.mutable_data_ptr<int32_t>(),
      .stored = static_cast<nefkern::cpu::StoredPlace*>(stored.mutable_data_ptr()),
      .merged = static_cast<nefkern::cpu::MergedPlace*>(merged.mutable_data_ptr()),
      .scale = scale,
      .pull = scale + n,
      .weights_gradient = found.mutable_data_ptr<float>(),
  };
  return {found, nefkern::cpu::adjacency_backward_for(nefkern::cpu::best_isa())(args)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nefkern_native, m) {
  m.def(
      "normalized_adjacency_backward(Tensor grad, Tensor indices, Tensor weights, Tensor "
      "row_offsets, Tensor columns, bool take_union, float clamp_min) -> (Tensor, bool)");
}

STABLE_TORCH_LIBRARY_IMPL(nefkern_native, CPU, m) {
  m.impl("normalized_adjacency_backward", TORCH_BOX(&normalized_adjacency_backward));
}
