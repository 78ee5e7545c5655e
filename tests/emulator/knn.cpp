// csrc/cuda/knn.cu on the processor: the launcher and all of its kernels.
#include "cuda/knn.cu"

#include "driver.h"

namespace {

using nefkern::emulator::Case;
using namespace nefkern::cuda;

void run_knn(Case& one) {
  const int64_t* offsets = one.input<int64_t>("offsets");
  KnnArgs args{};
  args.n = one.number("n");
  args.channels = one.number("channels");
  if (args.n * args.channels > 0) args.features = one.input<float>("features");
  args.segments = one.number("segments");
  args.offsets = offsets;
  if (args.segments > 1) args.device_offsets = offsets;
  args.k = one.number("k");
  args.metric = static_cast<KnnMetric>(one.number("metric"));
  args.include_self = one.number("include_self");
  args.method = static_cast<KnnMethod>(one.number("method"));
  args.database_offsets = one.input<int64_t>("database_offsets");
  if (args.across()) {
    args.database_rows = args.database_offsets[args.segments];
    if (args.database_rows * args.channels > 0) args.database = one.input<float>("database");
    if (args.segments > 1) args.device_database_offsets = args.database_offsets;
  }
  args.values = one.output<float>("values", args.n * args.k);
  args.indices = one.output<int32_t>("indices", args.n * args.k);
  args.tuning.score_bytes = one.number("score_bytes");
  args.tuning.chunk_rows = one.number("chunk_rows");
  args.tuning.sample_share = one.number("sample_share");
  args.tuning.keep = one.number("keep");
  args.tuning.fused_share = one.number("fused_share");
  args.tuning.tile_side = one.number("tile_side");
  char* workspace = one.workspace<char>(knn_workspace(args));
  const cudaError_t error = knn(args, workspace, nullptr);
  if (error != cudaSuccess) throw nefkern::emulator::Failure("knn returned an error");
  // Of the last chunk: whether estimates were enough. -1: there were none.
  const int* redone = cut(args, workspace).candidates.redo_count;
  *one.output<int>("redone", 1) = redone ? *redone : -1;
}

// The tile of every block: its number, or -1.
void run_tile_order(Case& one) {
  const auto count = [&](const char* name) { return static_cast<unsigned>(one.number(name)); };
  const TileOrder order{count("rows"), count("columns"), count("first_own"), count("side"),
                        count("mirrored") != 0};
  int64_t* tile = one.output<int64_t>("tiles", order.blocks());
  for (int64_t block = 0; block < order.blocks(); ++block) {
    unsigned row, column;
    const bool there = order.find(static_cast<unsigned>(block), row, column);
    tile[block] = there ? int64_t{row} * order.columns + column : -1;
  }
}

}  // namespace

int main(int argc, char** argv) {
  return nefkern::emulator::run_cases(argc, argv,
                                      {{"knn", &run_knn}, {"tile_order", &run_tile_order}});
}
