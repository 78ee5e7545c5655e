#include "cuda/kappa.h"
#include "cuda/merged_rows.cuh"
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
// that only the other graph has. In double, as add() does: the product by alpha is exact, so that
// fusing it changes nothing.
__device__ __forceinline__ float kappa_of(const Merged& entry, const Scales& scales, double alpha,
                                          int64_t row, int64_t column) {
  const double weight = symmetrized(entry);
  const float feature =
      weight == 0 ? 0 : normalized(weight, scales.features[row], scales.features[column]);
  const float pixel = entry.pixels == 0 ? 0 : scales.pixels[row] * scales.pixels[column];
  return static_cast<float>(feature + alpha * pixel);
}

__global__ void __launch_bounds__(kThreads)
    fill_both(RowPairs pairs, Scales scales, const KappaArgs args) {
  const int64_t row = global_warp();
  if (row >= pairs.num_nodes) return;
  const int64_t begin = args.row_offsets[row];
  for_each_entry(pairs, row, [&](int64_t place, int64_t column, const Merged& entry) {
    args.columns[begin + place] = static_cast<int32_t>(column);
    args.values[begin + place] = kappa_of(entry, scales, args.alpha, row, column);
  });
}

__global__ void __launch_bounds__(kThreads)
    fill_both_merged(const MergedRows rows, const KappaArgs args) {
  for_each_merged(rows, args.row_offsets, [&](int64_t row, int64_t number, int64_t place) {
    const int64_t to = args.row_offsets[row] + number;
    const auto column = static_cast<int32_t>(rows.entries.columns[place] & ~kPixelEntry);
    args.columns[to] = column;
    args.values[to] =
        kappa_of(merged_at(rows.entries, place), rows.scales, args.alpha, row, column);
  });
}

bool is_merged(const KappaArgs& args) {
  static_assert(kMergedNodes <= kMaxBitmapNodes);
  return args.num_nodes <= args.merged_nodes && args.num_nodes <= kMergedNodes;
}

MergedRows allocate_merged(const KappaArgs& args) {
  return place_merged(args.workspace, args.num_nodes, args.features.size + args.pixels.size,
                      args.long_names, 2);
}

SortedEdges allocate(const KappaArgs& args) {
  return place_edges(args.workspace, args.num_nodes, args.features.size + args.pixels.size, 2);
}

}  // namespace

cudaError_t kappa_bytes(const KappaArgs& args, size_t* bytes) {
  return bytes_of(is_merged(args) ? allocate_merged(args).scratch : allocate(args).scratch, bytes);
}

cudaError_t kappa_count(KappaArgs& args, int64_t* nnz, cudaStream_t stream) {
  if (is_merged(args)) {
    const MergedRows rows = allocate_merged(args);
    return count_step(args, rows.scratch, nnz, stream, [&](Launches& launch) {
      merge(launch, rows, args.features, args.pixels, false, args.row_offsets);
    });
  }
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
  if (is_merged(args)) {
    const MergedRows rows = allocate_merged(args);
    Launches launch(stream, rows.scratch.error);
    launch(fill_both_merged, blocks_of_merged(rows), kThreads, 0, rows, args);
    return launch.error();
  }
  const SortedEdges edges = allocate(args);
  Launches launch(stream, edges.scratch.error);
  launch(fill_both, blocks_of_warps(args.num_nodes), kThreads, 0,
         row_pairs(edges, args.sorted_half), edges.scales, args);
  return launch.error();
}

}  // namespace nefkern::cuda
