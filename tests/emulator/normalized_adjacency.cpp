// csrc/cuda/normalized_adjacency.cu on the processor.
#include "cuda/normalized_adjacency.cu"

#include "primitives_twin.h"
#include "two_steps.h"

namespace {

using nefkern::emulator::Case;
using namespace nefkern::cuda;

template <class Index>
void run(Case& one) {
  AdjacencyArgs args{};
  args.num_nodes = one.number("n");
  args.merged_nodes = one.number("merged_nodes");
  args.long_names = one.number("long_names");
  args.lists = {.indices = one.input<Index>("indices"),
                .wide_indices = sizeof(Index) == 8,
                .size = one.number("k"),
                .weights = one.input<float>("weights"),
                .clamp_min = static_cast<float>(one.real("clamp_min"))};
  args.take_union = one.number("take_union") != 0;
  nefkern::emulator::assemble(one, args, adjacency_bytes, adjacency_count, adjacency_fill);
}

}  // namespace

int main(int argc, char** argv) {
  return nefkern::emulator::run_cases(argc, argv,
                                      {{"int32", &run<int32_t>}, {"int64", &run<int64_t>}});
}
