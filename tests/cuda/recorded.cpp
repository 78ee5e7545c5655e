// Calls a launcher of csrc/cuda on the recording runtime: `recorded op [name=number ...]` prints
// what was enqueued, a line each, and what the launcher returned.
#include <cstdio>
#include <cstdlib>
#include <map>

#include "cuda/add.h"
#include "cuda/kappa.h"
#include "cuda/knn.h"
#include "cuda/normalized_adjacency.h"
#include "cuda/normalized_adjacency_backward.h"
#include "cuda/spmm.h"
#include "recording_runtime.h"

namespace {

using namespace nefkern::cuda;

const cudaStream_t kStream = reinterpret_cast<cudaStream_t>(0x57ea);
std::map<std::string, double> numbers;

int64_t number(const std::string& name, int64_t usual = 0) {
  const auto found = numbers.find(name);
  return found == numbers.end() ? usual : static_cast<int64_t>(found->second);
}

// An address that nothing lies at, aligned as cudaMalloc's but for `shift` bytes.
template <class T>
T* device(int64_t shift = 0) {
  static uintptr_t next = uintptr_t{1} << 20;
  next += 1 << 12;
  return reinterpret_cast<T*>(next + shift);
}

cudaError_t run_knn() {
  KnnArgs args{};
  args.n = number("n");
  args.channels = number("channels", 384);
  args.segments = number("segments", 1);
  std::vector<int64_t> offsets;
  for (int64_t s = 0; s <= args.segments; ++s) offsets.push_back(s * args.n / args.segments);
  args.offsets = offsets.data();
  args.device_offsets = args.segments > 1 ? device<int64_t>() : nullptr;
  args.features = device<float>(4);
  args.k = number("k");
  args.metric = static_cast<KnnMetric>(number("metric"));
  args.method = static_cast<KnnMethod>(number("method"));
  args.values = device<float>();
  args.indices = device<int32_t>();
  std::vector<int64_t> others;
  args.database_rows = number("database", -1);
  if (args.database_rows >= 0) {
    for (int64_t s = 0; s <= args.segments; ++s)
      others.push_back(s * args.database_rows / args.segments);
    args.database = device<float>(4);
    args.database_offsets = others.data();
    args.device_database_offsets = args.segments > 1 ? device<int64_t>() : nullptr;
  } else {
    args.database_rows = 0;
  }
  args.tuning.chunk_rows = number("chunk_rows", args.tuning.chunk_rows);
  args.tuning.candidate_bytes = number("candidate_bytes", args.tuning.candidate_bytes);
  args.tuning.tile_side = number("tile_side", args.tuning.tile_side);
  args.tuning.sample_share = number("sample_share", args.tuning.sample_share);
  args.tuning.fused_share = number("fused_share", args.tuning.fused_share);
  args.tuning.keep = number("keep", args.tuning.keep);
  std::printf("workspace %zu\n", knn_workspace(args));
  return knn(args, device<char>(), kStream);
}

cudaError_t run_spmm() {
  const auto storage = static_cast<Storage>(number("storage"));
  SpmmArgs args{.num_nodes = number("n"),
                .num_columns = number("columns"),
                .nnz = number("nnz"),
                .row_offsets = device<int64_t>(),
                .columns = device<int32_t>(),
                .values = device<float>(),
                .x = device<float>(number("shift")),
                .x_stride = number("columns"),
                .y = device<float>(),
                .x_storage = storage,
                .y_storage = number("wide_y", 1) ? Storage::kFloat32 : storage,
                .workspace = nullptr};
  std::printf("workspace %zu\n", spmm_workspace(args));
  args.workspace = device<char>();
  return spmm(args, kStream);
}

// Both steps; "between" where the caller allocates.
template <class Args>
cudaError_t assemble(Args args, cudaError_t (*bytes_of)(const Args&, size_t*),
                     cudaError_t (*count)(Args&, int64_t*, cudaStream_t),
                     cudaError_t (*fill)(const Args&, cudaStream_t)) {
  args.num_nodes = number("n");
  size_t bytes = 0;
  cudaError_t error = bytes_of(args, &bytes);
  std::printf("workspace %zu\n", bytes);
  if (error != cudaSuccess) return error;
  args.workspace = device<char>();
  args.row_offsets = device<int64_t>();
  int64_t nnz = 0;
  error = count(args, number("padded") ? nullptr : &nnz, kStream);
  if (error != cudaSuccess) return error;
  nefkern::recording::Event between;
  between.what = "between";
  nefkern::recording::events().push_back(between);
  args.columns = device<int32_t>();
  args.values = device<float>();
  return fill(args, kStream);
}

NeighbourLists lists(int64_t size, bool weighted) {
  return {device<int32_t>(), number("wide") != 0, size, weighted ? device<float>() : nullptr, 0};
}

cudaError_t run_adjacency_backward() {
  AdjacencyBackwardArgs args{.num_nodes = number("n"),
                             .nnz = number("nnz"),
                             .lists = lists(number("k"), true),
                             .take_union = false,
                             .row_offsets = device<int64_t>(),
                             .columns = device<int32_t>(),
                             .gradient = device<float>(),
                             .workspace = nullptr,
                             .weights_gradient = device<float>()};
  std::printf("workspace %zu\n", adjacency_backward_bytes(args));
  args.workspace = device<char>();
  return adjacency_backward(args, kStream);
}

cudaError_t count_sum(AddArgs& args, int64_t* nnz, cudaStream_t stream) {
  return add_count(args, nnz, stream);
}

cudaError_t call(const std::string& op) {
  if (op == "knn") return run_knn();
  if (op == "spmm") return run_spmm();
  if (op == "normalized_adjacency_backward") return run_adjacency_backward();
  if (op == "normalized_adjacency") {
    AdjacencyArgs args{};
    args.lists = lists(number("k"), true);
    return assemble(args, adjacency_bytes, adjacency_count, adjacency_fill);
  }
  if (op == "kappa") {
    KappaArgs args{};
    args.features = lists(number("k"), true);
    args.pixels = lists(number("near"), false);
    return assemble(args, kappa_bytes, kappa_count, kappa_fill);
  }
  if (op == "add") {
    AddArgs args{};
    args.a = args.b = {device<int64_t>(), device<int32_t>(), device<float>(), number("nnz")};
    return assemble(args, add_bytes, count_sum, add_fill);
  }
  std::fprintf(stderr, "no such operator: %s\n", op.c_str());
  std::exit(2);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  for (int i = 2; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t equals = argument.find('=');
    numbers[argument.substr(0, equals)] = std::atof(argument.c_str() + equals + 1);
  }
  nefkern::recording::failing() = number("fail", -1);
  const cudaError_t error = call(argv[1]);
  for (const auto& e : nefkern::recording::events())
    std::printf("%s %s %u %u %u %u %zu %d %d\n", e.what.c_str(),
                e.kernel.empty() ? "-" : e.kernel.c_str(), e.grid.x, e.grid.y, e.grid.z,
                e.block.x * e.block.y * e.block.z, e.bytes, e.asked, e.stream == kStream);
  std::printf("returned %d\n", error);
}
