// torch.ops.nefkern_native.normalized_adjacency: arguments come checked from nefkern.ops.
#include "cpu/normalized_adjacency.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "cpu/parallel.h"
#include "ops/large_empty.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Smaller lists are not worth a second thread.
constexpr int64_t kEdgesAThread = 16384;

// (row_offsets, columns, values, whether all indices were -1 to num_nodes - 1).
std::tuple<Tensor, Tensor, Tensor, bool> normalized_adjacency(const Tensor& indices,
                                                              std::optional<Tensor> weights,
                                                              bool take_union, double clamp_min) {
  const Tensor index = torch::stable::contiguous(indices);
  const ScalarType type = index.scalar_type();
  STD_TORCH_CHECK(index.dim() == 2 && (type == ScalarType::Int || type == ScalarType::Long),
                  "normalized_adjacency: expected int32 or int64 indices [N, k]");
  const int64_t n = index.size(0), edges = index.numel();
  std::optional<Tensor> weight;
  if (weights) {
    weight = torch::stable::contiguous(*weights);
    STD_TORCH_CHECK(weight->scalar_type() == ScalarType::Float && weight->numel() == edges,
                    "normalized_adjacency: expected float32 weights of the indices' shape");
  }
  const int64_t most = nefkern::cpu::num_threads(), wanted = edges / kEdgesAThread + 1;
  const int64_t workers = wanted < most ? wanted : most;
  const auto longs = [&](int64_t size) {
    return nefkern::large_empty(index, {size}, ScalarType::Long);
  };
  const auto floats = [&](int64_t size) {
    return nefkern::large_empty(index, {size}, ScalarType::Float);
  };
  Tensor cursors = longs(workers * n), incoming_offsets = longs(n + 1), incoming = longs(edges);
  Tensor maps = torch::stable::new_empty(index, {workers * nefkern::cpu::adjacency_map_bytes(n)},
                                         ScalarType::Byte);
  Tensor dense = floats(workers * nefkern::cpu::adjacency_dense_floats(n)), scale = floats(n);
  Tensor row_offsets = longs(n + 1);
  static_assert(sizeof(nefkern::cpu::IncomingEdge) == sizeof(int64_t));
  nefkern::cpu::AdjacencyArgs args{
      .num_nodes = n,
      .list_size = index.size(1),
      .indices = index.const_data_ptr(),
      .wide_indices = type == ScalarType::Long,
      .weights = weight ? weight->const_data_ptr<float>() : nullptr,
      .clamp_min = static_cast<float>(clamp_min),
      .take_union = take_union,
      .parts = workers,
      .cursors = cursors.mutable_data_ptr<int64_t>(),
      .incoming_offsets = incoming_offsets.mutable_data_ptr<int64_t>(),
      .incoming = static_cast<nefkern::cpu::IncomingEdge*>(incoming.mutable_data_ptr()),
      .workers = workers,
      .dense = dense.mutable_data_ptr<float>(),
      .maps = maps.mutable_data_ptr<uint8_t>(),
      .row_offsets = row_offsets.mutable_data_ptr<int64_t>(),
      .columns = nullptr,
      .values = nullptr,
      .scale = scale.mutable_data_ptr<float>(),
  };
  const nefkern::cpu::Isa isa = nefkern::cpu::best_isa();
  const bool valid = nefkern::cpu::adjacency_count_for(isa)(args);
  const int64_t nnz = valid ? args.row_offsets[n] : 0;
  Tensor columns = nefkern::large_empty(index, {nnz}, ScalarType::Int);
  Tensor values = floats(nnz);
  args.columns = columns.mutable_data_ptr<int32_t>();
  args.values = values.mutable_data_ptr<float>();
  if (valid) nefkern::cpu::adjacency_fill_for(isa)(args);
  return {row_offsets, columns, values, valid};
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
