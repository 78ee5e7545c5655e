// torch.ops.nefkern_native.sddmm: arguments come checked from nefkern.ops; shapes are checked again
// because a wrong one would be read out of bounds.
#include "cpu/sddmm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "ops/csr_checks.h"
#include "ops/large_empty.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// x_i . y_j [nnz] at the graph's places, and whether its offsets and columns made sense.
std::tuple<Tensor, bool> sddmm(const Tensor& row_offsets, const Tensor& columns,
                               const Tensor& dense_x, const Tensor& dense_y) {
  const Tensor offsets = torch::stable::contiguous(row_offsets);
  const Tensor column = torch::stable::contiguous(columns);
  const Tensor x = torch::stable::contiguous(dense_x);
  const Tensor y = torch::stable::contiguous(dense_y);
  Tensor values = nefkern::large_empty(x, {column.numel()}, ScalarType::Float);
  STD_TORCH_CHECK(nefkern::is_csr(offsets, column, values) && x.dim() == 2 && y.dim() == 2 &&
                      x.size(0) == y.size(0) && x.size(1) == y.size(1) &&
                      x.scalar_type() == ScalarType::Float &&
                      y.scalar_type() == ScalarType::Float && offsets.numel() == x.size(0) + 1,
                  "sddmm: expected a graph with as many nodes as x and y, of float32, have rows");
  if (!nefkern::never_falls(offsets, column.numel())) return {values, false};
  const nefkern::cpu::SddmmArgs args{
      .num_nodes = x.size(0),
      .num_columns = x.size(1),
      .row_offsets = offsets.const_data_ptr<int64_t>(),
      .columns = column.const_data_ptr<int32_t>(),
      .x = x.const_data_ptr<float>(),
      .y = y.const_data_ptr<float>(),
      .values = values.mutable_data_ptr<float>(),
  };
  return {values, nefkern::cpu::sddmm_for(nefkern::cpu::best_isa())(args)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nefkern_native, m) {
  m.def("sddmm(Tensor row_offsets, Tensor columns, Tensor x, Tensor y) -> (Tensor, bool)");
}

STABLE_TORCH_LIBRARY_IMPL(nefkern_native, CPU, m) { m.impl("sddmm", TORCH_BOX(&sddmm)); }
