// torch.ops.nefkern_native.add on CUDA tensors: arguments come checked from nefkern.ops.
#include "cuda/add.h"

#include <torch/csrc/stable/library.h>

#include "ops/csr_checks.h"
#include "ops/cuda/assemble.h"

namespace {

using torch::stable::Tensor;

struct Graph {
  Graph(const Tensor& row_offsets_, const Tensor& columns_, const Tensor& values_)
      : row_offsets(torch::stable::contiguous(row_offsets_)),
        columns(torch::stable::contiguous(columns_)),
        values(torch::stable::contiguous(values_)) {
    STD_TORCH_CHECK(nefkern::is_csr(row_offsets, columns, values),
                    "add: expected graphs of float32 values");
  }
  nefkern::cuda::SparseRows rows() const {
    return {row_offsets.const_data_ptr<int64_t>(), columns.const_data_ptr<int32_t>(),
            values.const_data_ptr<float>(), columns.numel()};
  }
  Tensor row_offsets, columns, values;
};

// (row_offsets, columns, values) of a + alpha b, and whether both graphs' offsets made sense.
std::tuple<Tensor, Tensor, Tensor, bool> add(const Tensor& row_offsets_a, const Tensor& columns_a,
                                             const Tensor& values_a, const Tensor& row_offsets_b,
                                             const Tensor& columns_b, const Tensor& values_b,
                                             double alpha) {
  const Graph a(row_offsets_a, columns_a, values_a), b(row_offsets_b, columns_b, values_b);
  STD_TORCH_CHECK(a.row_offsets.numel() == b.row_offsets.numel(), "add: expected as many nodes");
  nefkern::cuda::AddArgs args{};
  args.num_nodes = a.row_offsets.numel() - 1;
  args.a = a.rows();
  args.b = b.rows();
  args.alpha = static_cast<float>(alpha);
  return nefkern::assemble_on_gpu("add", a.columns, args, nefkern::cuda::add_bytes,
                                  nefkern::cuda::add_count, nefkern::cuda::add_fill);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nefkern_native, CUDA, m) { m.impl("add", TORCH_BOX(&add)); }
