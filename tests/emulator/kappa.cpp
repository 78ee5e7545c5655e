// csrc/cuda/kappa.cu on the processor.
#include "cuda/kappa.cu"

#include "primitives_twin.h"
#include "two_steps.h"

namespace {

using nefkern::emulator::Case;
using namespace nefkern::cuda;

template <class Index>
void run(Case& one) {
  KappaArgs args{};
  args.num_nodes = one.number("n");
  args.merged_nodes = one.number("merged_nodes");
  args.long_names = one.number("long_names");
  args.features = {.indices = one.input<Index>("indices"),
                   .wide_indices = sizeof(Index) == 8,
                   .size = one.number("k"),
                   .weights = one.input<float>("weights"),
                   .clamp_min = static_cast<float>(one.real("clamp_min"))};
  args.pixels = {.indices = one.input<int32_t>("pixel_indices"),
                 .wide_indices = false,
                 .size = one.number("near"),
                 .weights = nullptr,
                 .clamp_min = 0};
  args.alpha = static_cast<float>(one.real("alpha"));
  if (one.number("padded"))
    nefkern::emulator::assemble_padded(one, args, kappa_room(args), kappa_bytes, kappa_count,
                                       kappa_fill);
  else
    nefkern::emulator::assemble(one, args, kappa_bytes, kappa_count, kappa_fill);
}

}  // namespace

int main(int argc, char** argv) {
  return nefkern::emulator::run_cases(argc, argv,
                                      {{"int32", &run<int32_t>}, {"int64", &run<int64_t>}});
}
