// Every listed edge becomes two pairs, (i, j) and (j, i), and one radix sort of all pairs brings
// together what belongs to one entry: first what i listed, then what j did. A warp then walks a
// row. Nothing is added up in an order that chance decides, so that the result is always the same,
// and equal to its transpose bit for bit.
#pragma once

#include "cuda/edges.cuh"

namespace nefkern::cuda {

// What a pair says, in the lowest two bits of its key.
constexpr int kMirrored = 1;  // (j, i) of a listed edge (i, j)
constexpr int kPixels = 2;    // from the pixel graph's lists
constexpr int kKinds = 4;

// A pair's key: its place in the matrix, row-major, and what it says. Pairs that are left out get
// one beyond all places. Below 2^31 nodes it fits 64 bits.
__host__ __device__ __forceinline__ uint64_t key_of(int64_t num_nodes, int64_t row, int64_t column,
                                                    int kind) {
  return kKinds * static_cast<uint64_t>(row * num_nodes + column) + kind;
}
__host__ __device__ __forceinline__ uint64_t key_of_none(int64_t num_nodes) {
  return key_of(num_nodes, num_nodes, 0, 0);
}

// The pairs of one graph or of two, and what is found out about them.
struct SortedEdges {
  int64_t num_nodes;  // N
  int64_t count;      // of pairs: two a listed neighbour
  SortBuffers pairs;
  int64_t* bounds;  // [N + 1], where a row's pairs begin
  Scales scales;
  Scratch scratch;
};

// What a kernel reads of them.
struct RowPairs {
  int64_t num_nodes;
  const uint64_t* keys;
  const float* values;
  const int64_t* bounds;
};

namespace {

__global__ void __launch_bounds__(kThreads)
    emit_pairs(int64_t num_nodes, NeighbourLists lists, int kind, uint64_t* keys, float* values,
               Summary* summary) {
  const int64_t edges = num_nodes * lists.size;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (number >= edges) return;
  const Edge edge = edge_of(lists, number, num_nodes);
  if (edge.is_invalid) atomicOr(&summary->invalid, 1);
  const int64_t row = number / lists.size;
  const uint64_t none = key_of_none(num_nodes);
  keys[number] = edge.is_kept ? key_of(num_nodes, row, edge.node, kind) : none;
  keys[edges + number] = edge.is_kept ? key_of(num_nodes, edge.node, row, kind | kMirrored) : none;
  values[number] = values[edges + number] = edge.weight;
}

// Where the pairs of every row, and after the last those that are left out, begin.
__global__ void __launch_bounds__(kThreads)
    find_rows(int64_t num_nodes, int64_t pairs, const uint64_t* keys, int64_t* bounds) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row <= num_nodes)
    bounds[row] = lower_bound(keys, int64_t{0}, pairs, key_of(num_nodes, row, 0, 0));
}

// Merges the pairs that share the place of pair `first`.
__device__ __forceinline__ Merged merged(const RowPairs& pairs, int64_t first, int64_t end) {
  const uint64_t place = pairs.keys[first] / kKinds;
  Merged entry{};
  for (int64_t pair = first; pair < end && pairs.keys[pair] / kKinds == place; ++pair) {
    const int kind = static_cast<int>(pairs.keys[pair] % kKinds);
    const float weight = pairs.values[pair];
    if (kind & kPixels)
      entry.pixels = larger(entry.pixels, weight);
    else if (kind & kMirrored)
      entry.mirrored = larger(entry.mirrored, weight);
    else
      entry.listed = larger(entry.listed, weight);
  }
  return entry;
}

// f(place, column, entry) once for every entry of row `row`, by the lane whose pair is the entry's
// first; place counts the row's entries. Returns their number.
template <class F>
__device__ __forceinline__ int64_t for_each_entry(const RowPairs& pairs, int64_t row, const F& f) {
  const int64_t begin = pairs.bounds[row], end = pairs.bounds[row + 1];
  const uint64_t* keys = pairs.keys;
  const int lane = lane_id();
  int64_t entries = 0;
  for (int64_t chunk = begin; chunk < end; chunk += kWarp) {
    const int64_t pair = chunk + lane;
    const bool first =
        pair < end && (pair == begin || keys[pair] / kKinds != keys[pair - 1] / kKinds);
    const unsigned firsts = __ballot_sync(kAllLanes, first);
    if (first)
      f(entries + __popc(firsts & lanes_below(lane)),
        static_cast<int64_t>(keys[pair] / kKinds) - row * pairs.num_nodes,
        merged(pairs, pair, end));
    entries += __popc(firsts);
  }
  return entries;
}

// ---- the host's side ----

// Lays out the workspace for nodes of `listed` neighbours each, in one graph or two together.
inline SortedEdges place_edges(void* workspace, int64_t num_nodes, int64_t listed, int graphs) {
  SortedEdges edges{};
  size_t for_scan = 0, for_sort = 0;
  edges.scratch.error = offsets_bytes(num_nodes, &for_scan);
  if (edges.scratch.error != cudaSuccess) return edges;
  edges.num_nodes = num_nodes;
  edges.count = 2 * num_nodes * listed;
  const cudaError_t error = sort_bytes(edges.count, &for_sort);
  Workspace space(workspace);
  for (uint64_t*& keys : edges.pairs.keys) keys = space.take<uint64_t>(edges.count);
  for (float*& values : edges.pairs.values) values = space.take<float>(edges.count);
  edges.bounds = space.take<int64_t>(num_nodes + 1);
  edges.scales.features = space.take<float>(num_nodes);
  if (graphs == 2) edges.scales.pixels = space.take<float>(num_nodes);
  edges.scratch = take_scratch(space, for_scan > for_sort ? for_scan : for_sort, error);
  return edges;
}

inline int bits_of(uint64_t number) {
  int bits = 0;
  for (; number; number >>= 1) ++bits;
  return bits;
}

// Writes the pairs of `lists`, the first of them at `begin`; returns where the next lists' go.
inline int64_t emit(Launches& launch, const SortedEdges& edges, const NeighbourLists& lists,
                    int kind, int64_t begin) {
  const int64_t listed = edges.num_nodes * lists.size;
  launch(emit_pairs, blocks_of_threads(listed), kThreads, 0, edges.num_nodes, lists, kind,
         edges.pairs.keys[0] + begin, edges.pairs.values[0] + begin, edges.scratch.summary);
  return begin + 2 * listed;
}

// Sorts what was emitted and finds the rows. Returns which half of the buffers is the sorted one.
inline int sort_edges(Launches& launch, SortedEdges& edges) {
  uint64_t* const first_half = edges.pairs.keys[0];
  launch.then([&](cudaStream_t stream) {
    return sort_pairs(edges.scratch.temporary, edges.scratch.temporary_bytes, edges.pairs,
                      edges.count, bits_of(key_of_none(edges.num_nodes)), stream);
  });
  launch(find_rows, blocks_of_threads(edges.num_nodes + 1), kThreads, 0, edges.num_nodes,
         edges.count, edges.pairs.keys[0], edges.bounds);
  return edges.pairs.keys[0] == first_half ? 0 : 1;
}

// The pairs in half `half` of the buffers.
inline RowPairs row_pairs(const SortedEdges& edges, int half) {
  return {edges.num_nodes, edges.pairs.keys[half], edges.pairs.values[half], edges.bounds};
}

}  // namespace
}  // namespace nefkern::cuda
