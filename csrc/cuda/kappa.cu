#include "cuda/kappa.h"
#include "cuda/sorted_edges.cuh"

namespace nefkern::cuda {
namespace {

// A warp a row: the number of its entries, where its offset will be, and its scales.
__global__ void __launch_bounds__(kThreads)
    count_both(RowPairs pairs, int64_t* row_offsets, Scales scales) {
  const int64_t row = global_warp();
  if (row >= pairs.num_nodes) return;
  double degree = 0, pixel_degree = 0;
  const int64_t entries = for_each_entry(pairs, row, [&](int64_t, int64_t, const Merged& entry) {
    degree += symmetrized(entry);
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
    const double weight = symmetrized(entry);
    const float feature = weight == 0 ? 0 : normalized(weight, own, scales.features[column]);
    const float pixel = entry.pixels == 0 ? 0 : pixel_own * scales.pixels[column];
    args.columns[begin + place] = static_cast<int32_t>(column);
    // In double, as add() does: the product is exact, so that fusing it changes nothing.
    args.values[begin + place] = static_cast<float>(feature + alpha * pixel);
  });
}

SortedEdges allocate(const KappaArgs& args) {
  return place_edges(args.workspace, args.num_nodes, args.features.size + args.pixels.size, 2);
}

}  // namespace

cudaError_t kappa_bytes(const KappaArgs& args, size_t* bytes) {
  return bytes_of(allocate(args).scratch, bytes);
}

cudaError_t kappa_count(KappaArgs& args, int64_t* nnz, cudaStream_t stream) {
  SortedEdges edges = allocate(args);
  return count_step(args, edges.scratch, nnz, stream, [&](Launches& launch) {
    const int64_t pixels = emit(launch, edges, args.features, 0, 0);
    emit(launch, edges, args.pixels, kPixels, pixels);
    args.sorted_half = sort_edges(launch, edges);
    launch(count_both, blocks_of_warps(args.num_nodes), kThreads, 0, row_pairs(edges, 0),
           args.row_offsets, edges.scales);
  });
}

cudaError_t kappa_fill(const KappaArgs& args, cudaStream_t stream) {
  const SortedEdges edges = allocate(args);
  Launches launch(stream, edges.scratch.error);
  launch(fill_both, blocks_of_warps(args.num_nodes), kThreads, 0,
         row_pairs(edges, args.sorted_half), edges.scales, args);
  return launch.error();
}

}  // namespace nefkern::cuda
