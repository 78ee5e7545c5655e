#include "cuda/merged_rows.cuh"
#include "cuda/normalized_adjacency.h"
#include "cuda/sorted_edges.cuh"

namespace nefkern::cuda {
namespace {

// A warp a row: the number of its entries, where its offset will be, and d^(-1/2).
__global__ void __launch_bounds__(kThreads)
    count_entries(RowPairs pairs, bool take_union, int64_t* row_offsets, float* scale) {
  const int64_t row = global_warp();
  if (row >= pairs.num_nodes) return;
  double degree = 0;
  const int64_t entries = for_each_entry(pairs, row, [&](int64_t, int64_t, const Merged& entry) {
    degree += symmetrized(entry, take_union);
  });
  degree = warp_sum(degree);
  if (lane_id() != 0) return;
  row_offsets[row] = entries;
  scale[row] = inverse_root(degree);
}

__global__ void __launch_bounds__(kThreads)
    fill_rows(RowPairs pairs, const float* scale, const AdjacencyArgs args) {
  const int64_t row = global_warp();
  if (row >= pairs.num_nodes) return;
  const int64_t begin = args.row_offsets[row];
  const float own = scale[row];
  for_each_entry(pairs, row, [&](int64_t place, int64_t column, const Merged& entry) {
    args.columns[begin + place] = static_cast<int32_t>(column);
    args.values[begin + place] =
        normalized(symmetrized(entry, args.take_union), own, scale[column]);
  });
}

__global__ void __launch_bounds__(kThreads)
    fill_merged(const MergedRows rows, const AdjacencyArgs args) {
  const float* scale = rows.scales.features;
  for_each_merged(rows, args.row_offsets, [&](int64_t row, int64_t number, int64_t place) {
    const int64_t to = args.row_offsets[row] + number;
    const auto column = static_cast<int32_t>(rows.entries.columns[place] & ~kPixelEntry);
    const double weight = symmetrized(merged_at(rows.entries, place), args.take_union);
    args.columns[to] = column;
    args.values[to] = normalized(weight, scale[row], scale[column]);
  });
}

bool is_merged(const AdjacencyArgs& args) {
  static_assert(kMergedNodes <= kMaxBitmapNodes);
  return args.num_nodes <= args.merged_nodes && args.num_nodes <= kMergedNodes;
}

MergedRows allocate_merged(const AdjacencyArgs& args) {
  return place_merged(args.workspace, args.num_nodes, args.lists.size, args.long_names, 1);
}

SortedEdges allocate(const AdjacencyArgs& args) {
  return place_edges(args.workspace, args.num_nodes, args.lists.size, 1);
}

}  // namespace

cudaError_t adjacency_bytes(const AdjacencyArgs& args, size_t* bytes) {
  return bytes_of(is_merged(args) ? allocate_merged(args).scratch : allocate(args).scratch, bytes);
}

cudaError_t adjacency_count(AdjacencyArgs& args, int64_t* nnz, cudaStream_t stream) {
  if (is_merged(args)) {
    const MergedRows rows = allocate_merged(args);
    return count_step(args, rows.scratch, nnz, stream, [&](Launches& launch) {
      merge(launch, rows, args.lists, NeighbourLists{}, args.take_union, args.row_offsets);
    });
  }
  SortedEdges edges = allocate(args);
  return count_step(args, edges.scratch, nnz, stream, [&](Launches& launch) {
    emit(launch, edges, args.lists, 0, 0);
    args.sorted_half = sort_edges(launch, edges);
    launch(count_entries, blocks_of_warps(args.num_nodes), kThreads, 0, row_pairs(edges, 0),
           args.take_union, args.row_offsets, edges.scales.features);
  });
}

cudaError_t adjacency_fill(const AdjacencyArgs& args, cudaStream_t stream) {
  if (is_merged(args)) {
    const MergedRows rows = allocate_merged(args);
    Launches launch(stream, rows.scratch.error);
    launch(fill_merged, blocks_of_merged(rows), kThreads, 0, rows, args);
    return launch.error();
  }
  const SortedEdges edges = allocate(args);
  Launches launch(stream, edges.scratch.error);
  launch(fill_rows, blocks_of_warps(args.num_nodes), kThreads, 0,
         row_pairs(edges, args.sorted_half), edges.scales.features, args);
  return launch.error();
}

}  // namespace nefkern::cuda
