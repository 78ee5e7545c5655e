// torch.ops.nefkern_native.spmm: arguments come checked from nefkern.ops; shapes are checked again
// because a wrong one would be read out of bounds.
#include "cpu/spmm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "ops/csr_checks.h"
#include "ops/large_empty.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

nefkern::cpu::Storage storage_of(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "spmm: expected float32 or bfloat16");
  return type == ScalarType::Float ? nefkern::cpu::Storage::kFloat32
                                   : nefkern::cpu::Storage::kBFloat16;
}

// kappa x [N, K], in float32 if `accumulated`, else in the type of x; and whether the graph's
// offsets and columns made sense.
std::tuple<Tensor, bool> spmm(const Tensor& row_offsets, const Tensor& columns,
                              const Tensor& values, const Tensor& dense, bool accumulated) {
  const Tensor offsets = torch::stable::contiguous(row_offsets);
  const Tensor column = torch::stable::contiguous(columns);
  const Tensor value = torch::stable::contiguous(values);
  const Tensor x = torch::stable::contiguous(dense);
  STD_TORCH_CHECK(
      nefkern::is_csr(offsets, column, value) && x.dim() == 2 && offsets.numel() == x.size(0) + 1,
      "spmm: expected a graph of float32 values with as many nodes as x has rows");
  Tensor y = nefkern::large_empty(x, {x.size(0), x.size(1)},
                                  accumulated ? ScalarType::Float : x.scalar_type());
  if (!nefkern::never_falls(offsets, column.numel())) return {y, false};
  const nefkern::cpu::SpmmArgs args{
      .num_nodes = x.size(0),
      .num_columns = x.size(1),
      .row_offsets = offsets.const_data_ptr<int64_t>(),
      .columns = column.const_data_ptr<int32_t>(),
      .values = value.const_data_ptr<float>(),
      .x = x.const_data_ptr(),
      .y = y.mutable_data_ptr(),
      .x_storage = storage_of(x),
      .y_storage = storage_of(y),
  };
  return {y, nefkern::cpu::spmm_for(nefkern::cpu::best_isa())(args)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nefkern_native, m) {
  m.def(
      "spmm(Tensor row_offsets, Tensor columns, Tensor values, Tensor x, bool accumulated) -> "
      "(Tensor, bool)");
}

STABLE_TORCH_LIBRARY_IMPL(nefkern_native, CPU, m) { m.impl("spmm", TORCH_BOX(&spmm)); }
