#include "cuda/kappa.h"
#include "cuda/sorted_edges.cuh"

namespace nefkern::cuda {
namespace {

// d^(-1/2) in either graph, [N] each.
struct Scales {
  float* features;
  float* pixels;
};

__device__ __forceinline__ float feature_weight(const Merged& entry) {
  return fabsf(0.5f * (entry.listed + entry.mirrored));  // no sign, a NaN's neither
}

// A warp a row: the number of its entries, where its offset will be, and its scales.
__global__ void __launch_bounds__(kThreads)
    count_both(RowPairs pairs, int64_t* row_offsets, Scales scales) {
  const int64_t row = global_warp();
  if (row >= pairs.num_nodes) return;
  double degree = 0, pixel_degree = 0;
  const int64_t entries = for_each_entry(pairs, row, [&](int64_t, int64_t, const Merged& entry) {
    degree += feature_weight(entry);
    pixel_degree += entry.pixels;
  });
  degree = warp_sum(degree);
  pixel_degree = warp_sum(pixel_degree);
  if (lane_id() != 0) return;
  row_offsets[row] = entries;
  scales.features[row] = inverse_root(degree);
  scales.pixels[row] = inverse_root(pixel_degree);
}

// A node without neighbours in one graph has an infinite scale there, which must not meet an entry
// that only the other graph has.
__global__ void __launch_bounds__(kThreads)
    fill_both(RowPairs pairs, Scales scales, const KappaArgs args) {
  const int64_t row = global_warp();
  if (row >= pairs.num_nodes) return;
  const int64_t begin = args.row_offsets[row];
  const float own = scales.features[row], pixel_own = scales.pixels[row];
  const double alpha = args.alpha;
  for_each_entry(pairs, row, [&](int64_t place, int64_t column, const Merged& entry) {
    const float weight = feature_weight(entry);
    const float feature = weight == 0 ? 0 : weight * (own * scales.features[column]);
    const float pixel = entry.pixels == 0 ? 0 : pixel_own * scales.pixels[column];
    args.columns[begin + place] = static_cast<int32_t>(column);
    // In double, as add() does: the product is exact, so that fusing it changes nothing.
    args.values[begin + place] = static_cast<float>(feature + alpha * pixel);
  });
}

struct Memory {
  SortedEdges edges;
  Scales scales;
  size_t bytes;
};

cudaError_t cut(const KappaArgs& args, Memory* memory) {
  Workspace space(args.workspace);
  const int64_t listed = args.num_nodes * (args.features.size + args.pixels.size);
  const cudaError_t error = cut_edges(space, args.num_nodes, listed, &memory->edges);
  memory->scales = {space.take<float>(args.num_nodes), space.take<float>(args.num_nodes)};
  memory->bytes = space.bytes();
  return error;
}

}  // namespace

cudaError_t kappa_bytes(const KappaArgs& args, size_t* bytes) {
  Memory memory{};
  const cudaError_t error = cut(args, &memory);
  *bytes = memory.bytes;
  return error;
}

cudaError_t kappa_count(KappaArgs& args, int64_t* nnz, cudaStream_t stream) {
  Memory memory{};
  const cudaError_t error = cut(args, &memory);
  if (error != cudaSuccess) return error;
  SortedEdges& edges = memory.edges;
  Launches launch(stream);
  launch.zero(edges.summary, sizeof(Summary));
  const int64_t pixels = emit(launch, edges, args.features, 0, 0);
  emit(launch, edges, args.pixels, kPixels, pixels);
  args.sorted_half = sort_edges(launch, edges);
  launch(count_both, blocks_of_warps(args.num_nodes), kThreads, 0, row_pairs(edges, 0),
         args.row_offsets, memory.scales);
  offsets_from_sizes(launch, edges.temporary, edges.temporary_bytes, args.row_offsets,
                     args.num_nodes, edges.summary);
  return read_nnz(launch, edges.summary, nnz);
}

cudaError_t kappa_fill(const KappaArgs& args, cudaStream_t stream) {
  Memory memory{};
  const cudaError_t error = cut(args, &memory);
  if (error != cudaSuccess) return error;
  Launches launch(stream);
  launch(fill_both, blocks_of_warps(args.num_nodes), kThreads, 0,
         row_pairs(memory.edges, args.sorted_half), memory.scales, args);
  return launch.error();
}

}  // namespace nefkern::cuda
