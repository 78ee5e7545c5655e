// A warp a row: every entry finds its place in the sum by a search in the other graph's row, so
// that no lane waits for another's merge.
#include "cuda/add.h"
#include "cuda/two_steps.cuh"

namespace nefkern::cuda {
namespace {

struct Row {
  const int32_t* columns;
  const float* values;
  int64_t size;
};

__device__ __forceinline__ Row row_of(const SparseRows& graph, int64_t row) {
  const int64_t begin = graph.row_offsets[row];
  return {graph.columns + begin, graph.values + begin, graph.row_offsets[row + 1] - begin};
}

// Whether row `row` is as it should be, and the offsets' ends are right: both sizes below, and the
// places that follow from them, rest on columns that ascend. The same answer in every lane.
__device__ __forceinline__ bool is_valid(const SparseRows& graph, int64_t row, int64_t num_nodes) {
  const int64_t begin = graph.row_offsets[row], end = graph.row_offsets[row + 1];
  if (begin < 0 || begin > end || end > graph.nnz || (row == 0 && begin != 0) ||
      (row == num_nodes - 1 && end != graph.nnz))
    return false;
  bool ascends = true;
  for (int64_t entry = begin + lane_id(); entry < end; entry += kWarp) {
    const int32_t column = graph.columns[entry];
    ascends = ascends && column >= 0 && column < num_nodes &&
              (entry == begin || graph.columns[entry - 1] < column);
  }
  return __all_sync(kAllLanes, ascends);
}

// f(entry of `row`, place of its column in `other`, whether it is there too, entries before it that
// are in both) for all entries, a lane each. Returns how many are in both.
template <class F>
__device__ __forceinline__ int64_t for_each_entry(const Row& row, const Row& other, const F& f) {
  const int lane = lane_id();
  int64_t both = 0;
  for (int64_t chunk = 0; chunk < row.size; chunk += kWarp) {
    const int64_t entry = chunk + lane;
    const bool mine = entry < row.size;
    const int32_t column = mine ? row.columns[entry] : 0;
    const int64_t place = mine ? lower_bound(other.columns, int64_t{0}, other.size, column) : 0;
    const bool shared = mine && place < other.size && other.columns[place] == column;
    const unsigned lanes = __ballot_sync(kAllLanes, shared);
    if (mine) f(entry, place, shared, both + __popc(lanes & lanes_below(lane)));
    both += __popc(lanes);
  }
  return both;
}

__global__ void __launch_bounds__(kThreads) count_union(const AddArgs args, Summary* summary) {
  const int64_t row = global_warp();
  if (row >= args.num_nodes) return;
  int64_t size = 0;
  if (is_valid(args.a, row, args.num_nodes) && is_valid(args.b, row, args.num_nodes)) {
    const Row a = row_of(args.a, row), b = row_of(args.b, row);
    const auto nothing = [](int64_t, int64_t, bool, int64_t) {};
    size = a.size + b.size -
           (a.size < b.size ? for_each_entry(a, b, nothing) : for_each_entry(b, a, nothing));
  } else if (lane_id() == 0) {
    atomicOr(&summary->invalid, 1);
  }
  if (lane_id() == 0) args.row_offsets[row] = size;
}

__global__ void __launch_bounds__(kThreads) fill_union(const AddArgs args) {
  const int64_t row = global_warp();
  if (row >= args.num_nodes) return;
  const Row a = row_of(args.a, row), b = row_of(args.b, row);
  int32_t* columns = args.columns + args.row_offsets[row];
  float* values = args.values + args.row_offsets[row];
  // In double the products are exact: a sum is rounded once, so that a symmetric one stays so.
  const double alpha = args.alpha;
  for_each_entry(a, b, [&](int64_t entry, int64_t place, bool shared, int64_t both) {
    const int64_t to = entry + place - both;
    const double other = shared ? alpha * b.values[place] : 0;
    columns[to] = a.columns[entry];
    values[to] = static_cast<float>(a.values[entry] + other);
  });
  for_each_entry(b, a, [&](int64_t entry, int64_t place, bool shared, int64_t both) {
    if (shared) return;
    const int64_t to = entry + place - both;
    columns[to] = b.columns[entry];
    values[to] = static_cast<float>(alpha * b.values[entry]);
  });
}

Scratch allocate(const AddArgs& args) {
  size_t for_scan = 0;
  const cudaError_t error = offsets_bytes(args.num_nodes, &for_scan);
  Workspace space(args.workspace);
  return take_scratch(space, for_scan, error);
}

}  // namespace

cudaError_t add_bytes(const AddArgs& args, size_t* bytes) {
  return bytes_of(allocate(args), bytes);
}

cudaError_t add_count(const AddArgs& args, int64_t* nnz, cudaStream_t stream) {
  const Scratch scratch = allocate(args);
  return count_step(args, scratch, nnz, stream, [&](Launches& launch) {
    launch(count_union, blocks_of_warps(args.num_nodes), kThreads, 0, args, scratch.summary);
  });
}

cudaError_t add_fill(const AddArgs& args, cudaStream_t stream) {
  Launches launch(stream);
  launch(fill_union, blocks_of_warps(args.num_nodes), kThreads, 0, args);
  return launch.error();
}

}  // namespace nefkern::cuda
