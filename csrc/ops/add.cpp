// torch.ops.nefkern_native.add: arguments come checked from nefkern.ops.
#include "cpu/add.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "ops/assemble.h"
#include "ops/csr_checks.h"

namespace {

using torch::stable::Tensor;

// (row_offsets, columns, values) of a + alpha b, and whether both graphs' offsets made sense.
std::tuple<Tensor, Tensor, Tensor, bool> add(const Tensor& row_offsets_a, const Tensor& columns_a,
                                             const Tensor& values_a, const Tensor& row_offsets_b,
                                             const Tensor& columns_b, const Tensor& values_b,
                                             double alpha) {
  const Tensor a[] = {torch::stable::contiguous(row_offsets_a),
                      torch::stable::contiguous(columns_a), torch::stable::contiguous(values_a)};
  const Tensor b[] = {torch::stable::contiguous(row_offsets_b),
                      torch::stable::contiguous(columns_b), torch::stable::contiguous(values_b)};
  STD_TORCH_CHECK(nefkern::is_csr(a[0], a[1], a[2]) && nefkern::is_csr(b[0], b[1], b[2]) &&
                      a[0].numel() == b[0].numel(),
                  "add: expected two graphs of float32 values and as many nodes");
  const auto rows = [](const Tensor* graph) {
    return nefkern::cpu::SparseRows{graph[0].const_data_ptr<int64_t>(),
                                    graph[1].const_data_ptr<int32_t>(),
                                    graph[2].const_data_ptr<float>()};
  };
  nefkern::cpu::AddArgs args{
      .num_nodes = a[0].numel() - 1,
      .a = rows(a),
      .b = rows(b),
      .alpha = static_cast<float>(alpha),
      .row_offsets = nullptr,
      .columns = nullptr,
      .values = nullptr,
  };
  const nefkern::cpu::Isa isa = nefkern::cpu::best_isa();
  const auto count = [&](const nefkern::cpu::AddArgs& its) {
    const bool valid = nefkern::never_falls(a[0], a[1].numel()) &&
                       nefkern::never_falls(b[0], b[1].numel()) &&
                       nefkern::below(a[1], its.num_nodes) && nefkern::below(b[1], its.num_nodes);
    if (valid) nefkern::cpu::add_count_for(isa)(its);
    return valid;
  };
  return nefkern::assemble(a[1], args.num_nodes, args, count, nefkern::cpu::add_fill_for(isa));
}

// The gradient `grad` of a sum's values at the places of one of its two matrices, and whether the
// sum has them all.
std::tuple<Tensor, bool> add_backward(const Tensor& grad, const Tensor& row_offsets,
                                      const Tensor& columns, const Tensor& own_offsets,
                                      const Tensor& own_columns) {
  const Tensor sum[] = {torch::stable::contiguous(row_offsets), torch::stable::contiguous(columns),
                        torch::stable::contiguous(grad)};
  const Tensor offsets = torch::stable::contiguous(own_offsets);
  const Tensor column = torch::stable::contiguous(own_columns);
  Tensor values = nefkern::large_empty(sum[2], {column.numel()}, sum[2].scalar_type());
  STD_TORCH_CHECK(nefkern::is_csr(sum[0], sum[1], sum[2]) &&
                      nefkern::is_csr(offsets, column, values) && sum[0].numel() == offsets.numel(),
                  "add_backward: expected two graphs of as many nodes and a float32 gradient");
  if (!nefkern::never_falls(sum[0], sum[1].numel()) ||
      !nefkern::never_falls(offsets, column.numel()))
    return {values, false};
  const nefkern::cpu::AddBackwardArgs args{
      .num_nodes = offsets.numel() - 1,
      .sum = {sum[0].const_data_ptr<int64_t>(), sum[1].const_data_ptr<int32_t>(),
              sum[2].const_data_ptr<float>()},
      .row_offsets = offsets.const_data_ptr<int64_t>(),
      .columns = column.const_data_ptr<int32_t>(),
      .values = values.mutable_data_ptr<float>(),
  };
  return {values, nefkern::cpu::add_backward_for(nefkern::cpu::best_isa())(args)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nefkern_native, m) {
  m.def(
      "add(Tensor row_offsets_a, Tensor columns_a, Tensor values_a, Tensor row_offsets_b, Tensor "
      "columns_b, Tensor values_b, float alpha) -> (Tensor, Tensor, Tensor, bool)");
  m.def(
      "add_backward(Tensor grad, Tensor row_offsets, Tensor columns, Tensor own_offsets, Tensor "
      "own_columns) -> (Tensor, bool)");
}

STABLE_TORCH_LIBRARY_IMPL(nefkern_native, CPU, m) {
  m.impl("add", TORCH_BOX(&add));
  m.impl("add_backward", TORCH_BOX(&add_backward));
}
