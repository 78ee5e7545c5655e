// torch.ops.nefkern_native.knn_cuda. Arguments come checked from nefkern.ops; what would be read or
// written out of bounds is checked again.
#include "cuda/knn.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "ops/cuda/stream.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// features [N, C] float32 on the GPU, offsets [S + 1] int64 on the host (which plans by them) and
// on the GPU (none: one segment) -> values [N, k] float32, indices [N, k] int32. `method`:
// KnnMethod.
std::tuple<Tensor, Tensor> knn(const Tensor& features, const Tensor& offsets,
                               const std::optional<Tensor>& device_offsets, int64_t k,
                               bool euclidean, bool include_self, int64_t method) {
  STD_TORCH_CHECK(features.dim() == 2 && features.scalar_type() == ScalarType::Float,
                  "knn: expected float32 features [N, C]");
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.scalar_type() == ScalarType::Long &&
                      offsets.is_cpu() && offsets.numel() > 0 && k > 0 && 0 <= method &&
                      method <= 2,
                  "knn: expected int64 offsets [S + 1] on the host, a positive k and a method");
  const Tensor x = torch::stable::contiguous(features);
  const Tensor bounds = torch::stable::contiguous(offsets);
  const int64_t n = x.size(0), segments = bounds.numel() - 1;
  const int64_t* offset = bounds.const_data_ptr<int64_t>();
  bool valid = n < int64_t{1} << 31 && offset[0] == 0 && offset[segments] == n;
  for (int64_t s = 0; s < segments; ++s) valid = valid && offset[s] <= offset[s + 1];
  STD_TORCH_CHECK(valid, "knn: expected offsets from 0 to N < 2^31 that never fall");
  const bool one = !device_offsets;
  STD_TORCH_CHECK(one ? n == 0 || segments == 1
                      : device_offsets->is_cuda() && device_offsets->numel() == segments + 1 &&
                            device_offsets->scalar_type() == ScalarType::Long &&
                            device_offsets->is_contiguous(),
                  "knn: expected the same offsets on the GPU");
  const nefkern::OnDeviceOf on(x);
  Tensor values = torch::stable::new_empty(x, {n, k});
  Tensor indices = torch::stable::new_empty(x, {n, k}, ScalarType::Int);
  nefkern::cuda::KnnArgs args{};
  args.features = x.const_data_ptr<float>();
  args.n = n;
  args.channels = x.size(1);
  args.offsets = offset;
  args.device_offsets = one ? nullptr : device_offsets->const_data_ptr<int64_t>();
  args.segments = segments;
  args.k = k;
  args.euclidean = euclidean;
  args.include_self = include_self;
  args.method = static_cast<nefkern::cuda::KnnMethod>(method);
  args.values = values.mutable_data_ptr<float>();
  args.indices = indices.mutable_data_ptr<int32_t>();
  const Tensor workspace = nefkern::bytes_like(x, nefkern::cuda::knn_workspace(args));
  nefkern::check_cuda("knn", nefkern::cuda::knn(args, workspace.mutable_data_ptr(), on.stream()));
  return {values, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nefkern_native, m) {
  m.def(
      "knn_cuda(Tensor features, Tensor offsets, Tensor? device_offsets, int k, bool euclidean, "
      "bool include_self, int method) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(nefkern_native, CUDA, m) { m.impl("knn_cuda", TORCH_BOX(&knn)); }
