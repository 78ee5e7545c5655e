// torch.ops.nefkern_native.knn. Arguments come checked from nefkern.ops; what would be read or
// written out of bounds is checked again.
#include "cpu/knn.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether these are offsets [S + 1] from 0 to `rows` that never fall.
bool cover(const Tensor& offsets, int64_t rows) {
  const int64_t segments = offsets.numel() - 1;
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  bool valid = offset[0] == 0 && offset[segments] == rows;
  for (int64_t s = 0; s < segments; ++s) valid = valid && offset[s] <= offset[s + 1];
  return valid;
}

// features [N, C] float32, offsets [S + 1] int64, `metric`: KnnMetric, database [M, C] float32 with
// as many offsets -> values [N, k] float32, indices [N, k] int32
std::tuple<Tensor, Tensor> knn(const Tensor& features, const Tensor& offsets, int64_t k,
                               int64_t metric, bool include_self,
                               const std::optional<Tensor>& database,
                               const std::optional<Tensor>& database_offsets) {
  STD_TORCH_CHECK(features.dim() == 2 && features.scalar_type() == ScalarType::Float,
                  "knn: expected float32 features [N, C]");
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.scalar_type() == ScalarType::Long &&
                      offsets.numel() > 0 && k > 0 && 0 <= metric && metric <= 2,
                  "knn: expected int64 offsets [S + 1], a positive k and a metric");
  const Tensor x = torch::stable::contiguous(features);
  const Tensor bounds = torch::stable::contiguous(offsets);
  const int64_t n = x.size(0), segments = bounds.numel() - 1;
  STD_TORCH_CHECK(cover(bounds, n), "knn: expected offsets from 0 to N that never fall");
  const Tensor others = torch::stable::contiguous(database ? *database : x);
  const Tensor other_bounds =
      torch::stable::contiguous(database_offsets ? *database_offsets : bounds);
  STD_TORCH_CHECK(database.has_value() == database_offsets.has_value() && others.dim() == 2 &&
                      others.scalar_type() == ScalarType::Float && others.size(1) == x.size(1) &&
                      other_bounds.dim() == 1 && other_bounds.scalar_type() == ScalarType::Long &&
                      other_bounds.numel() == segments + 1 && cover(other_bounds, others.size(0)),
                  "knn: expected a float32 database [M, C] with offsets [S + 1] from 0 to M");
  Tensor values = torch::stable::new_empty(x, {n, k});
  Tensor indices = torch::stable::new_empty(x, {n, k}, ScalarType::Int);
  nefkern::cpu::knn_for(nefkern::cpu::best_isa())({
      .features = x.const_data_ptr<float>(),
      .n = n,
      .channels = x.size(1),
      .offsets = bounds.const_data_ptr<int64_t>(),
      .segments = segments,
      .k = k,
      .metric = static_cast<nefkern::cpu::KnnMetric>(metric),
      .include_self = include_self,
      .values = values.mutable_data_ptr<float>(),
      .indices = indices.mutable_data_ptr<int32_t>(),
      .database = database ? others.const_data_ptr<float>() : nullptr,
      .database_rows = database ? others.size(0) : 0,
      .database_offsets = database ? other_bounds.const_data_ptr<int64_t>() : nullptr,
  });
  return {values, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nefkern_native, m) {
  m.def(
      "knn(Tensor features, Tensor offsets, int k, int metric, bool include_self, Tensor? "
      "database, "
      "Tensor? database_offsets) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(nefkern_native, CPU, m) { m.impl("knn", TORCH_BOX(&knn)); }
