#include "cuda/normalized_adjacency.h"
#include "cuda/sorted_edges.cuh"

namespace nefkern::cuda {
namespace {

__device__ __forceinline__ double symmetrized(const Merged& entry, bool take_union) {
  return take_union ? fabsf(larger(entry.listed, entry.mirrored)) : symmetrized(entry);
}

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

SortedEdges allocate(const AdjacencyArgs& args) {
  return place_edges(args.workspace, args.num_nodes, args.lists.size, 1);
}

}  // namespace

cudaError_t adjacency_bytes(const AdjacencyArgs& args, size_t* bytes) {
  return bytes_of(allocate(args).scratch, bytes);
}

cudaError_t adjacency_count(AdjacencyArgs& args, int64_t* nnz, cudaStream_t stream) {
  SortedEdges edges = allocate(args);
  return count_step(args, edges.scratch, nnz, stream, [&](Launches& launch) {
    emit(launch, edges, args.lists, 0, 0);
    args.sorted_half = sort_edges(launch, edges);
    launch(count_entries, blocks_of_warps(args.num_nodes), kThreads, 0, row_pairs(edges, 0),
           args.take_union, args.row_offsets, edges.scales.features);
  });
}

cudaError_t adjacency_fill(const AdjacencyArgs& args, cudaStream_t stream) {
  const SortedEdges edges = allocate(args);
  Launches launch(stream, edges.scratch.error);
  launch(fill_rows, blocks_of_warps(args.num_nodes), kThreads, 0,
         row_pairs(edges, args.sorted_half), edges.scales.features, args);
  return launch.error();
}

}  // namespace nefkern::cuda
