#include "cuda/normalized_adjacency.h"
#include "cuda/sorted_edges.cuh"

namespace nefkern::cuda {
namespace {

__device__ __forceinline__ float symmetrized(const Merged& entry, bool take_union) {
  return take_union ? larger(entry.listed, entry.mirrored) : 0.5f * (entry.listed + entry.mirrored);
}

// A warp a row: the number of its entries, where its offset will be, and d^(-1/2).
__global__ void __launch_bounds__(kThreads)
    count_entries(RowPairs pairs, bool take_union, int64_t* row_offsets, float* scale) {
  const int64_t row = global_warp();
  if (row >= pairs.num_nodes) return;
  double degree = 0;
  const int64_t entries = for_each_entry(pairs, row, [&](int64_t, int64_t, const Merged& entry) {
    degree += fabs(static_cast<double>(symmetrized(entry, take_union)));
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
    const float a = fabsf(symmetrized(entry, args.take_union));  // no sign, a NaN's neither
    args.columns[begin + place] = static_cast<int32_t>(column);
    args.values[begin + place] = a * (own * scale[column]);
  });
}

struct Memory {
  SortedEdges edges;
  float* scale;  // [N], d^(-1/2)
  size_t bytes;
};

cudaError_t cut(const AdjacencyArgs& args, Memory* memory) {
  Workspace space(args.workspace);
  const cudaError_t error =
      cut_edges(space, args.num_nodes, args.num_nodes * args.lists.size, &memory->edges);
  memory->scale = space.take<float>(args.num_nodes);
  memory->bytes = space.bytes();
  return error;
}

}  // namespace

cudaError_t adjacency_bytes(const AdjacencyArgs& args, size_t* bytes) {
  Memory memory{};
  const cudaError_t error = cut(args, &memory);
  *bytes = memory.bytes;
  return error;
}

cudaError_t adjacency_count(AdjacencyArgs& args, int64_t* nnz, cudaStream_t stream) {
  Memory memory{};
  const cudaError_t error = cut(args, &memory);
  if (error != cudaSuccess) return error;
  SortedEdges& edges = memory.edges;
  Launches launch(stream);
  launch.zero(edges.summary, sizeof(Summary));
  emit(launch, edges, args.lists, 0, 0);
  args.sorted_half = sort_edges(launch, edges);
  launch(count_entries, blocks_of_warps(args.num_nodes), kThreads, 0, row_pairs(edges, 0),
         args.take_union, args.row_offsets, memory.scale);
  offsets_from_sizes(launch, edges.temporary, edges.temporary_bytes, args.row_offsets,
                     args.num_nodes, edges.summary);
  return read_nnz(launch, edges.summary, nnz);
}

cudaError_t adjacency_fill(const AdjacencyArgs& args, cudaStream_t stream) {
  Memory memory{};
  const cudaError_t error = cut(args, &memory);
  if (error != cudaSuccess) return error;
  Launches launch(stream);
  launch(fill_rows, blocks_of_warps(args.num_nodes), kThreads, 0,
         row_pairs(memory.edges, args.sorted_half), memory.scale, args);
  return launch.error();
}

}  // namespace nefkern::cuda
