// torch.ops.nefkern_native.spmm on CUDA tensors: arguments come checked from nefkern.ops; shapes
// are checked again because a wrong one would be read out of bounds.
#include "cuda/spmm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/csr_checks.h"
#include "ops/cuda/stream.h"

namespace {

using nefkern::cuda::Storage;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Storage storage_of(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
      "spmm: expected float32, float16 or bfloat16");
  if (type == ScalarType::Float) return Storage::kFloat32;
  return type == ScalarType::Half ? Storage::kFloat16 : Storage::kBFloat16;
}

// kappa x [N, K], in float32 if `accumulated`, else in the type of x; and true: what offsets and
// columns say is not looked at first, since the host would have to wait for the answer.
std::tuple<Tensor, bool> spmm(const Tensor& row_offsets, const Tensor& columns,
                              const Tensor& values, const Tensor& dense, bool accumulated) {
  const Tensor offsets = torch::stable::contiguous(row_offsets);
  const Tensor column = torch::stable::contiguous(columns);
  const Tensor value = torch::stable::contiguous(values);
  STD_TORCH_CHECK(nefkern::is_csr(offsets, column, value) && dense.dim() == 2 &&
                      offsets.numel() == dense.size(0) + 1,
                  "spmm: expected a graph of float32 values with as many nodes as x has rows");
  const bool adjacent = dense.stride(1) == 1 && dense.stride(0) >= dense.size(1);
  const Tensor x = adjacent ? dense : torch::stable::contiguous(dense);
  const nefkern::OnDeviceOf device(x);
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1)},
                                      accumulated ? ScalarType::Float : x.scalar_type());
  nefkern::cuda::SpmmArgs args{
      .num_nodes = x.size(0),
      .num_columns = x.size(1),
      .nnz = column.numel(),
      .row_offsets = offsets.const_data_ptr<int64_t>(),
      .columns = column.const_data_ptr<int32_t>(),
      .values = value.const_data_ptr<float>(),
      .x = x.const_data_ptr(),
      .x_stride = x.stride(0),
      .y = y.mutable_data_ptr(),
      .x_storage = storage_of(x),
      .y_storage = storage_of(y),
      .workspace = nullptr,
  };
  const Tensor workspace = nefkern::bytes_like(x, nefkern::cuda::spmm_workspace(args));
  args.workspace = workspace.mutable_data_ptr();
  nefkern::check_cuda("spmm", nefkern::cuda::spmm(args, device.stream()));
  return {y, true};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nefkern_native, CUDA, m) { m.impl("spmm", TORCH_BOX(&spmm)); }
