// torch.ops.nefkern_native.knn. Arguments come checked from nefkern.ops; what would be read or
// written out of bounds is checked again.
#include "cpu/knn.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// features [N, C] float32, offsets [S + 1] int64 -> values [N, k] float32, indices [N, k] int32
std::tuple<Tensor, Tensor> knn(const Tensor& features, const Tensor& offsets, int64_t k,
                               bool euclidean, bool include_self) {
  STD_TORCH_CHECK(features.dim() == 2 && features.scalar_type() == ScalarType::Float,
                  "knn: expected float32 features [N, C]");
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.scalar_type() == ScalarType::Long &&
                      offsets.numel() > 0 && k > 0,
                  "knn: expected int64 offsets [S + 1] and a positive k");
  const Tensor x = torch::stable::contiguous(features);
  const Tensor bounds = torch::stable::contiguous(offsets);
  const int64_t n = x.size(0), segments = bounds.numel() - 1;
  const int64_t* offset = bounds.const_data_ptr<int64_t>();
  bool valid = offset[0] == 0 && offset[segments] == n;
  for (int64_t s = 0; s < segments; ++s) valid = valid && offset[s] <= offset[s + 1];
  STD_TORCH_CHECK(valid, "knn: expected offsets from 0 to N that never fall");
  Tensor values = torch::stable::new_empty(x, {n, k});
  Tensor indices = torch::stable::new_empty(x, {n, k}, ScalarType::Int);
  nefkern::cpu::knn_for(nefkern::cpu::best_isa())({
      .features = x.const_data_ptr<float>(),
      .n = n,
      .channels = x.size(1),
      .offsets = offset,
      .segments = segments,
      .k = k,
      .euclidean = euclidean,
      .include_self = include_self,
      .values = values.mutable_data_ptr<float>(),
      .indices = indices.mutable_data_ptr<int32_t>(),
  });
  return {values, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nefkern_native, m) {
  m.def(
      "knn(Tensor features, Tensor offsets, int k, bool euclidean, bool include_self) -> (Tensor, "
      "Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(nefkern_native, CPU, m) { m.impl("knn", TORCH_BOX(&knn)); }
