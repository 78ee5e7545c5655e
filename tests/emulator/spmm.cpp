// csrc/cuda/spmm.cu on the processor.
#include "cuda/spmm.cu"

#include "driver.h"

namespace {

using nefkern::emulator::Case;
using namespace nefkern::cuda;

template <class X, class Y>
void run(Case& one, Storage x_storage, Storage y_storage) {
  const int64_t n = one.number("n"), k = one.number("k"), shift = one.number("shift");
  SpmmArgs args{.num_nodes = n,
                .num_columns = k,
                .nnz = one.number("nnz"),
                .row_offsets = one.input<int64_t>("row_offsets"),
                .columns = one.input<int32_t>("columns"),
                .values = one.input<float>("values"),
                .x = one.input<X>("x", shift),
                .x_stride = one.number("stride"),
                .y = one.output<Y>("y", n * k),
                .x_storage = x_storage,
                .y_storage = y_storage,
                .workspace = nullptr};
  args.workspace = one.workspace<char>(spmm_workspace(args));
  if (spmm(args, nullptr) != cudaSuccess)
    throw nefkern::emulator::Failure("a launcher returned an error");
}

}  // namespace

int main(int argc, char** argv) {
  constexpr Storage kFloat = Storage::kFloat32, kHalf = Storage::kFloat16,
                    kBrain = Storage::kBFloat16;
  return nefkern::emulator::run_cases(
      argc, argv,
      {{"float32", [](Case& one) { run<float, float>(one, kFloat, kFloat); }},
       {"float16", [](Case& one) { run<Half, Half>(one, kHalf, kHalf); }},
       {"float16_wide", [](Case& one) { run<Half, float>(one, kHalf, kFloat); }},
       {"bfloat16", [](Case& one) { run<BFloat16, BFloat16>(one, kBrain, kBrain); }},
       {"bfloat16_wide", [](Case& one) { run<BFloat16, float>(one, kBrain, kFloat); }}});
}
