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

// Whether these are int64 offsets [S + 1] on the host, from 0 to `rows`, that never fall.
bool cover(const Tensor& offsets, int64_t rows) {
  if (offsets.dim() != 1 || offsets.scalar_type() != ScalarType::Long || !offsets.is_cpu() ||
      offsets.numel() == 0)
    return false;
  const int64_t segments = offsets.numel() - 1;
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  bool valid = offset[0] == 0 && offset[segments] == rows;
  for (int64_t s = 0; s < segments; ++s) valid = valid && offset[s] <= offset[s + 1];
  return valid;
}

// Whether these may be the same offsets on the GPU; without them there is one segment.
bool matches(const std::optional<Tensor>& device_offsets, int64_t segments, int64_t rows) {
  if (!device_offsets) return rows == 0 || segments == 1;
  return device_offsets->is_cuda() && device_offsets->numel() == segments + 1 &&
         device_offsets->scalar_type() == ScalarType::Long && device_offsets->is_contiguous();
}

const int64_t* data_of(const std::optional<Tensor>& offsets) {
  return offsets ? offsets->const_data_ptr<int64_t>() : nullptr;
}

// features [N, C] float32 on the GPU, offsets [S + 1] int64 on the host (which plans by them) and
// on the GPU (none: one segment), `metric`: KnnMetric, database [M, C] float32 with as many
// offsets, `method`: KnnMethod -> values [N, k] float32, indices [N, k] int32.
std::tuple<Tensor, Tensor> knn(const Tensor& features, const Tensor& offsets,
                               const std::optional<Tensor>& device_offsets, int64_t k,
                               int64_t metric, bool include_self,
                               const std::optional<Tensor>& database,
                               const std::optional<Tensor>& database_offsets,
                               const std::optional<Tensor>& device_database_offsets,
                               int64_t method) {
  STD_TORCH_CHECK(features.dim() == 2 && features.scalar_type() == ScalarType::Float,
                  "knn: expected float32 features [N, C]");
  STD_TORCH_CHECK(k > 0 && 0 <= metric && metric <= 2 && 0 <= method && method <= 2,
                  "knn: expected a positive k, a metric and a method");
  const Tensor x = torch::stable::contiguous(features);
  const Tensor bounds = torch::stable::contiguous(offsets);
  const int64_t n = x.size(0), segments = bounds.numel() - 1;
  STD_TORCH_CHECK(cover(bounds, n) && matches(device_offsets, segments, n),
                  "knn: expected offsets from 0 to N that never fall, the same on the GPU");
  const Tensor others = torch::stable::contiguous(database ? *database : x);
  const Tensor other_bounds =
      torch::stable::contiguous(database_offsets ? *database_offsets : bounds);
  const int64_t m = database ? others.size(0) : 0;
  STD_TORCH_CHECK(n + m < int64_t{1} << 31, "knn: expected fewer than 2^31 rows in all");
  STD_TORCH_CHECK(
      database.has_value() == database_offsets.has_value() && others.dim() == 2 &&
          others.scalar_type() == ScalarType::Float && others.size(1) == x.size(1) &&
          other_bounds.numel() == segments + 1 && cover(other_bounds, others.size(0)) &&
          (!database || (device_offsets.has_value() == device_database_offsets.has_value() &&
                         matches(device_database_offsets, segments, n))),
      "knn: expected a float32 database [M, C] with offsets [S + 1] from 0 to M");
  const nefkern::OnDeviceOf on(x);
  Tensor values = torch::stable::new_empty(x, {n, k});
  Tensor indices = torch::stable::new_empty(x, {n, k}, ScalarType::Int);
  nefkern::cuda::KnnArgs args{};
  args.features = x.const_data_ptr<float>();
  args.n = n;
  args.channels = x.size(1);
  args.offsets = bounds.const_data_ptr<int64_t>();
  args.device_offsets = data_of(device_offsets);
  args.segments = segments;
  args.k = k;
  args.metric = static_cast<nefkern::cuda::KnnMetric>(metric);
  args.include_self = include_self;
  args.method = static_cast<nefkern::cuda::KnnMethod>(method);
  args.values = values.mutable_data_ptr<float>();
  args.indices = indices.mutable_data_ptr<int32_t>();
  if (database) {
    args.database = others.const_data_ptr<float>();
    args.database_rows = m;
    args.database_offsets = other_bounds.const_data_ptr<int64_t>();
    args.device_database_offsets = data_of(device_database_offsets);
  }
  const Tensor workspace = nefkern::bytes_like(x, nefkern::cuda::knn_workspace(args));
  nefkern::check_cuda("knn", nefkern::cuda::knn(args, workspace.mutable_data_ptr(), on.stream()));
  return {values, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nefkern_native, m) {
  m.def(
      "knn_cuda(Tensor features, Tensor offsets, Tensor? device_offsets, int k, int metric, bool "
      "include_self, Tensor? database, Tensor? database_offsets, Tensor? device_database_offsets, "
      "int method) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(nefkern_native, CUDA, m) { m.impl("knn_cuda", TORCH_BOX(&knn)); }
