// csrc/cuda/normalized_adjacency_backward.cu on the processor.
#include "cuda/normalized_adjacency_backward.cu"

#include "driver.h"

namespace {

using nefkern::emulator::Case;
using namespace nefkern::cuda;

template <class Index>
void run(Case& one) {
  const int64_t n = one.number("n"), k = one.number("k");
  AdjacencyBackwardArgs args{.num_nodes = n,
                             .nnz = one.number("nnz"),
                             .lists = {.indices = one.input<Index>("indices"),
                                       .wide_indices = sizeof(Index) == 8,
                                       .size = k,
                                       .weights = one.input<float>("weights"),
                                       .clamp_min = static_cast<float>(one.real("clamp_min"))},
                             .take_union = one.number("take_union") != 0,
                             .row_offsets = one.input<int64_t>("row_offsets"),
                             .columns = one.input<int32_t>("columns"),
                             .gradient = one.input<float>("gradient"),
                             .workspace = nullptr,
                             .weights_gradient = one.output<float>("found", n * k)};
  args.workspace = one.workspace<char>(adjacency_backward_bytes(args));
  if (adjacency_backward(args, nullptr) != cudaSuccess)
    throw nefkern::emulator::Failure("a launcher returned an error");
}

}  // namespace

int main(int argc, char** argv) {
  return nefkern::emulator::run_cases(argc, argv,
                                      {{"int32", &run<int32_t>}, {"int64", &run<int64_t>}});
}
