// csrc/cuda/add.cu on the processor.
#include "cuda/add.cu"

#include "primitives_twin.h"
#include "two_steps.h"

namespace {

using nefkern::emulator::Case;
using namespace nefkern::cuda;

SparseRows graph(Case& one, const std::string& name) {
  return {one.input<int64_t>("row_offsets_" + name), one.input<int32_t>("columns_" + name),
          one.input<float>("values_" + name), one.number("nnz_" + name)};
}

void run(Case& one) {
  AddArgs args{};
  args.num_nodes = one.number("n");
  args.a = graph(one, "a");
  args.b = graph(one, "b");
  args.alpha = static_cast<float>(one.real("alpha"));
  nefkern::emulator::assemble(one, args, add_bytes, add_count, add_fill);
}

}  // namespace

int main(int argc, char** argv) {
  return nefkern::emulator::run_cases(argc, argv, {{"add", &run}});
}
