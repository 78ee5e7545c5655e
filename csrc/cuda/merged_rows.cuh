// A graph's rows without a sort: every node first learns who names it in a list, by a counting sort
// of the listed edges; then a block merges a row, what its node lists and who names that, by
// marking the neighbours in a bitmap. A neighbour's place in the row is the number of those marked
// before.
//
// A hub's row takes one block long; the first blocks look for hubs, so that such a row is begun
// before all others and is not what the device waits for at the end.
//
// In which order a node learns its names is up to chance, and whatever comes of them is a maximum
// or a bit: the result is always the same, and equal to its transpose bit for bit.
#pragma once

#include "cuda/bitmap.cuh"
#include "cuda/edges.cuh"

namespace nefkern::cuda {

// Of a node whose list names another: twice its number, and whether by the pixel graph.
struct Name {
  uint32_t node_and_graph;
  float weight;
};

// Merged entries; row i has room for what its node lists and for its names.
struct MergedEntries {
  uint32_t* columns;  // and kPixelEntry
  uint32_t* listed;   // largest weights, as the bits of floats that are not negative
  uint32_t* mirrored;
};

struct MergedRows {
  int64_t num_nodes;   // N, at most kMaxBitmapNodes
  int64_t list_size;   // neighbours that a node lists, in both graphs together
  int64_t* bounds;     // [N + 1], where the names of each node begin
  int32_t* name_of;    // [N, list_size], which of a node's names an edge is; -1: none
  Name* names;         // [N, list_size]
  int64_t long_names;  // names from which on a node is a hub, 1 at least
  MergedEntries entries;
  Scales scales;
  Scratch scratch;

  __host__ __device__ __forceinline__ int64_t begin_of(int64_t row) const {
    return row * list_size + bounds[row];
  }
  __device__ __forceinline__ bool is_hub(int64_t row) const {
    return bounds[row + 1] - bounds[row] >= long_names;
  }
};

namespace {

constexpr uint32_t kPixelEntry = 1u << 31;
constexpr int kMergeThreads = 256;
constexpr int kPlaces = 8;  // a lane's, of for_each_merged()
// Entries of a row that are merged in shared memory; longer rows are in place.
constexpr int kMergedInShared = 1024;

__device__ __forceinline__ unsigned long long* counts_of(int64_t* bounds) {
  return reinterpret_cast<unsigned long long*>(bounds);
}

// Counts the names of every node in `bounds`; `first` is the lists' first edge.
__global__ void __launch_bounds__(kThreads)
    count_names(MergedRows rows, NeighbourLists lists, int64_t first, Summary* summary) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (number >= rows.num_nodes * lists.size) return;
  const Edge edge = edge_of(lists, number, rows.num_nodes);
  if (edge.is_invalid) atomicOr(&summary->invalid, 1);
  rows.name_of[first + number] =
      edge.is_kept ? static_cast<int32_t>(atomicAdd(&counts_of(rows.bounds)[edge.node], 1ull)) : -1;
}

__global__ void __launch_bounds__(kThreads)
    write_names(MergedRows rows, NeighbourLists lists, int64_t first, int of_pixels) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (number >= rows.num_nodes * lists.size) return;
  const int32_t place = rows.name_of[first + number];
  if (place < 0) return;
  const Edge edge = edge_of(lists, number, rows.num_nodes);
  const auto node = static_cast<uint32_t>(number / lists.size);
  rows.names[rows.bounds[edge.node] + place] = {2 * node + of_pixels, edge.weight};
}

// f(neighbour, weight, whether mirrored, whether by the pixel graph) for all edges of a row, by the
// threads of a block.
template <class F>
__device__ __forceinline__ void for_each_edge(const MergedRows& rows,
                                              const NeighbourLists& features,
                                              const NeighbourLists& pixels, int64_t row,
                                              const F& f) {
  const auto listed = [&](const NeighbourLists& lists, bool of_pixels) {
    for (int64_t i = threadIdx.x; i < lists.size; i += kMergeThreads) {
      const Edge edge = edge_of(lists, row * lists.size + i, rows.num_nodes);
      if (edge.is_kept) f(static_cast<int>(edge.node), edge.weight, false, of_pixels);
    }
  };
  listed(features, false);
  listed(pixels, true);
  // A hub has thousands of names: several loads are on their way at a time.
  constexpr int kAtOnce = 4;
  const int64_t end = rows.bounds[row + 1];
  for (int64_t i = rows.bounds[row] + threadIdx.x; i < end; i += kAtOnce * kMergeThreads) {
    Name names[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (i + j * kMergeThreads < end) names[j] = rows.names[i + j * kMergeThreads];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (i + j * kMergeThreads < end)
        f(static_cast<int>(names[j].node_and_graph / 2), names[j].weight, true,
          names[j].node_and_graph % 2 != 0);
  }
}

struct Degrees {
  double features;
  unsigned pixels;  // entries of weight 1
};

// The sum of a block's threads, in an order that only their numbers decide; in thread 0.
__device__ __forceinline__ Degrees block_sum(Degrees own) {
  struct Parts {
    Degrees of[kMergeThreads / kWarp];
  };
  Parts& parts = block_shared<Parts>();
  own = {warp_sum(own.features), __reduce_add_sync(kAllLanes, own.pixels)};
  if (lane_id() == 0) parts.of[threadIdx.x / kWarp] = own;
  __syncthreads();
  for (int warp = 1; warp < kMergeThreads / kWarp && threadIdx.x == 0; ++warp) {
    own.features += parts.of[warp].features;
    own.pixels += parts.of[warp].pixels;
  }
  return own;
}

// An entry; what atomic operations wrote is in the L2 cache, and maybe not in the first level's.
__device__ __forceinline__ Merged merged_at(const MergedEntries& entries, int64_t place) {
  const auto read = [](const uint32_t* from) {
    return *const_cast<const volatile uint32_t*>(from);
  };
  return {__uint_as_float(read(entries.listed + place)),
          __uint_as_float(read(entries.mirrored + place)),
          read(entries.columns + place) & kPixelEntry ? 1.0f : 0.0f};
}

// Merges the edges of a row into `own`, which has `size` entries; the degrees, by a block's thread.
// Written twice, for shared and for global memory.
__device__ __forceinline__ Degrees merge_into(const MergedEntries& own, const MergedRows& rows,
                                              const NeighbourLists& features,
                                              const NeighbourLists& pixels, int64_t row,
                                              const Bitmap& bitmap, int size, bool take_union) {
  for (int i = threadIdx.x; i < size; i += kMergeThreads)
    own.columns[i] = own.listed[i] = own.mirrored[i] = 0;
  __syncthreads();
  for_each_edge(
      rows, features, pixels, row, [&](int node, float weight, bool mirrored, bool of_pixels) {
        const int place = place_of(bitmap, node);
        atomicOr(own.columns + place, static_cast<uint32_t>(node) | (of_pixels ? kPixelEntry : 0));
        // No sign, a NaN's neither: that is larger than all others then.
        const unsigned bits = __float_as_uint(weight) & 0x7fffffffu;
        if (of_pixels) return;
        if (mirrored)
          atomicMax(own.mirrored + place, bits);
        else
          atomicMax(own.listed + place, bits);
      });
  __syncthreads();
  Degrees degrees{};
  for (int i = threadIdx.x; i < size; i += kMergeThreads) {
    const Merged entry = merged_at(own, i);
    degrees.features += symmetrized(entry, take_union);
    degrees.pixels += entry.pixels != 0;
  }
  return degrees;
}

// One row: its entries, their number where its offset will be, and its scales. The bitmap and a
// row's entries, if they fit, are in dynamic shared memory.
__device__ __forceinline__ void merge_row(const MergedRows& rows, const NeighbourLists& features,
                                          const NeighbourLists& pixels, bool take_union, int words,
                                          int64_t row, int64_t* row_offsets) {
  uint32_t* shared = dynamic_shared<uint32_t>();
  const MergedEntries staged{shared, shared + kMergedInShared, shared + 2 * kMergedInShared};
  const Bitmap bitmap = bitmap_at(shared + 3 * kMergedInShared, words);
  clear<kMergeThreads>(bitmap);
  __syncthreads();
  for_each_edge(rows, features, pixels, row,
                [&](int node, float, bool, bool) { mark(bitmap, node); });
  __syncthreads();
  const int size = count_marked<kMergeThreads>(bitmap);
  const int64_t begin = rows.begin_of(row);
  const MergedEntries placed{rows.entries.columns + begin, rows.entries.listed + begin,
                             rows.entries.mirrored + begin};
  Degrees degrees;
  if (size > kMergedInShared) {
    degrees = merge_into(placed, rows, features, pixels, row, bitmap, size, take_union);
  } else {
    degrees = merge_into(staged, rows, features, pixels, row, bitmap, size, take_union);
    for (int i = threadIdx.x; i < size; i += kMergeThreads) {
      placed.columns[i] = staged.columns[i];
      placed.listed[i] = staged.listed[i];
      placed.mirrored[i] = staged.mirrored[i];
    }
  }
  degrees = block_sum(degrees);
  if (threadIdx.x != 0) return;
  row_offsets[row] = size;
  rows.scales.features[row] = inverse_root(degrees.features);
  if (rows.scales.pixels) rows.scales.pixels[row] = inverse_root(degrees.pixels);
}

// Of all names, in pieces of long_names: the hub whose names begin in a piece, or -1. There is one
// at most, and it has the piece's last name. By a warp together.
__device__ __forceinline__ int64_t hub_of(const MergedRows& rows, int64_t piece) {
  const int64_t begin = piece * rows.long_names, total = rows.bounds[rows.num_nodes];
  if (begin >= total) return -1;
  const int64_t last = min(begin + rows.long_names, total) - 1;
  const int64_t row = range_of(rows.num_nodes, last, [&](int64_t i) { return rows.bounds[i]; });
  return rows.bounds[row] >= begin && rows.is_hub(row) ? row : -1;
}

// A block a row. Before them a block a piece of the names: it merges the hub's row, if there is
// one.
__global__ void __launch_bounds__(kMergeThreads)
    merge_rows(MergedRows rows, NeighbourLists features, NeighbourLists pixels, bool take_union,
               int words, int64_t pieces, int64_t* row_offsets) {
  const int64_t own = static_cast<int64_t>(blockIdx.x) - pieces;
  const int64_t row = own < 0 ? hub_of(rows, blockIdx.x) : own;
  if (row < 0 || (own >= 0 && rows.is_hub(own))) return;
  merge_row(rows, features, pixels, take_union, words, row, row_offsets);
}

// f(row, place among the row's entries, where it is among the merged ones) for every entry: a lane
// a place that there is room for, so that long rows are many warps'.
template <class F>
__device__ __forceinline__ void for_each_merged(const MergedRows& rows, const int64_t* row_offsets,
                                                const F& f) {
  const int64_t room = 2 * rows.num_nodes * rows.list_size;
  int64_t place = global_warp() * kWarp * kPlaces;
  if (place >= room) return;
  const auto begin_of = [&](int64_t row) { return rows.begin_of(row); };
  int64_t row = range_of(rows.num_nodes, place, begin_of);
  place += lane_id();
  for (int i = 0; i < kPlaces && place < room; ++i, place += kWarp) {
    while (row + 1 < rows.num_nodes && begin_of(row + 1) <= place) ++row;
    const int64_t number = place - begin_of(row);
    if (number < row_offsets[row + 1] - row_offsets[row]) f(row, number, place);
  }
}

// ---- the host's side ----

// Lays out the workspace for nodes that list `list_size` neighbours, in one graph or two together.
inline MergedRows place_merged(void* workspace, int64_t num_nodes, int64_t list_size,
                               int64_t long_names, int graphs) {
  MergedRows rows{};
  size_t for_scan = 0;
  rows.scratch.error = offsets_bytes(num_nodes, &for_scan);
  if (rows.scratch.error != cudaSuccess) return rows;
  rows.num_nodes = num_nodes;
  rows.list_size = list_size;
  rows.long_names = long_names;
  const int64_t edges = num_nodes * list_size;
  Workspace space(workspace);
  rows.bounds = space.take<int64_t>(num_nodes + 1);
  rows.name_of = space.take<int32_t>(edges);
  rows.names = space.take<Name>(edges);
  for (uint32_t** part : {&rows.entries.columns, &rows.entries.listed, &rows.entries.mirrored})
    *part = space.take<uint32_t>(2 * edges);
  rows.scales.features = space.take<float>(num_nodes);
  if (graphs == 2) rows.scales.pixels = space.take<float>(num_nodes);
  rows.scratch = take_scratch(space, for_scan, cudaSuccess);
  return rows;
}

// Names, merged rows, their sizes and scales.
inline void merge(Launches& launch, const MergedRows& rows, const NeighbourLists& features,
                  const NeighbourLists& pixels, bool take_union, int64_t* row_offsets) {
  const int64_t first_pixel = rows.num_nodes * features.size;
  const auto blocks = [&](const NeighbourLists& lists) {
    return blocks_of_threads(rows.num_nodes * lists.size);
  };
  launch.zero(rows.bounds, (rows.num_nodes + 1) * sizeof(int64_t));
  launch(count_names, blocks(features), kThreads, 0, rows, features, 0, rows.scratch.summary);
  launch(count_names, blocks(pixels), kThreads, 0, rows, pixels, first_pixel, rows.scratch.summary);
  launch.then([&](cudaStream_t stream) {
    return exclusive_scan(rows.scratch.temporary, rows.scratch.temporary_bytes, rows.bounds,
                          rows.num_nodes + 1, stream);
  });
  launch(write_names, blocks(features), kThreads, 0, rows, features, 0, 0);
  launch(write_names, blocks(pixels), kThreads, 0, rows, pixels, first_pixel, 1);
  const int words = words_of(rows.num_nodes);
  const int64_t pieces = tiles(rows.num_nodes * rows.list_size, rows.long_names);
  launch(merge_rows, pieces + rows.num_nodes, kMergeThreads,
         3 * kMergedInShared * sizeof(uint32_t) + bitmap_bytes(words), rows, features, pixels,
         take_union, words, pieces, row_offsets);
}

// Blocks of for_each_merged().
inline int64_t blocks_of_merged(const MergedRows& rows) {
  return tiles(2 * rows.num_nodes * rows.list_size, kThreads * kPlaces);
}

}  // namespace
}  // namespace nefkern::cuda
