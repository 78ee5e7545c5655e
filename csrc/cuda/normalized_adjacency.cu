// Every listed edge becomes two pairs, (i, j) and (j, i), and one radix sort of all pairs brings
// together what belongs to one entry: first what i listed, then what j did. A warp then walks a
// row. Nothing is added up in an order that chance decides, so that the result is always the same,
// and equal to its transpose bit for bit.
#include "cuda/normalized_adjacency.h"
#include "cuda/primitives.h"
#include "cuda/two_steps.cuh"
#include "cuda/warp.cuh"
#include "cuda/workspace.h"

namespace nefkern::cuda {
namespace {

// A pair's key: its place in the matrix, row-major, and in the lowest bit whether it is mirrored.
// Pairs that are left out get one beyond all places.
__host__ __device__ __forceinline__ uint64_t key_of(int64_t num_nodes, int64_t row, int64_t column,
                                                    bool mirrored) {
  return 2 * static_cast<uint64_t>(row * num_nodes + column) + mirrored;
}
__host__ __device__ __forceinline__ uint64_t key_of_none(int64_t num_nodes) {
  return key_of(num_nodes, num_nodes, 0, false);
}

struct Memory {
  SortBuffers pairs;  // [2 N k]
  int64_t* bounds;    // [N + 1], where a row's pairs begin
  float* scale;       // [N], d^(-1/2)
  Summary* summary;
  void* temporary;
  size_t temporary_bytes, bytes;
};

cudaError_t cut(const AdjacencyArgs& args, Memory* memory) {
  const int64_t n = args.num_nodes, pairs = 2 * n * args.size;
  size_t for_scan = 0, for_sort = 0;
  cudaError_t error = scan_bytes(n + 1, &for_scan);
  if (error == cudaSuccess) error = sort_bytes(pairs, &for_sort);
  Workspace space(args.workspace);
  for (uint64_t*& keys : memory->pairs.keys) keys = space.take<uint64_t>(pairs);
  for (float*& values : memory->pairs.values) values = space.take<float>(pairs);
  memory->bounds = space.take<int64_t>(n + 1);
  memory->scale = space.take<float>(n);
  memory->summary = space.take<Summary>(1);
  memory->temporary_bytes = for_scan > for_sort ? for_scan : for_sort;
  memory->temporary = space.take<char>(static_cast<int64_t>(memory->temporary_bytes));
  memory->bytes = space.bytes();
  return error;
}

template <class Index>
__global__ void __launch_bounds__(kThreads)
    emit_pairs(const AdjacencyArgs args, uint64_t* keys, float* values, Summary* summary) {
  const int64_t edges = args.num_nodes * args.size, n = args.num_nodes;
  const int64_t edge = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (edge >= edges) return;
  const int64_t row = edge / args.size;
  const int64_t node = static_cast<const Index*>(args.indices)[edge];
  if (node < -1 || node >= n) atomicOr(&summary->invalid, 1);
  float weight = args.weights ? args.weights[edge] : 1.0f;
  if (weight < args.clamp_min) weight = args.clamp_min;
  // "Not <=" rather than ">": a NaN stays visible.
  const bool kept = node >= 0 && node < n && !(weight <= 0);
  keys[edge] = kept ? key_of(n, row, node, false) : key_of_none(n);
  keys[edges + edge] = kept ? key_of(n, node, row, true) : key_of_none(n);
  values[edge] = values[edges + edge] = weight;
}

// Where the pairs of every row, and after the last those that are left out, begin.
__global__ void __launch_bounds__(kThreads)
    find_rows(int64_t num_nodes, int64_t pairs, const uint64_t* keys, int64_t* bounds) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row <= num_nodes)
    bounds[row] = lower_bound(keys, int64_t{0}, pairs, key_of(num_nodes, row, 0, false));
}

__device__ __forceinline__ float larger(float a, float b) { return b > a || b != b ? b : a; }

// One entry of A: merges the pairs that share the place of pair `first`.
__device__ __forceinline__ float merged(const uint64_t* keys, const float* values, int64_t first,
                                        int64_t end, bool take_union) {
  const uint64_t place = keys[first] / 2;
  float listed = 0, mirrored = 0;
  for (int64_t pair = first; pair < end && keys[pair] / 2 == place; ++pair) {
    if (keys[pair] % 2)
      mirrored = larger(mirrored, values[pair]);
    else
      listed = larger(listed, values[pair]);
  }
  return take_union ? larger(listed, mirrored) : 0.5f * (listed + mirrored);
}

// f(place, a) once for every entry of row `row`, by the lane whose pair is the entry's first; place
// counts the row's entries. Returns their number.
template <class F>
__device__ __forceinline__ int64_t for_each_entry(const AdjacencyArgs& args, const uint64_t* keys,
                                                  const float* values, const int64_t* bounds,
                                                  int64_t row, const F& f) {
  const int64_t begin = bounds[row], end = bounds[row + 1];
  const int lane = lane_id();
  int64_t entries = 0;
  for (int64_t chunk = begin; chunk < end; chunk += kWarp) {
    const int64_t pair = chunk + lane;
    const bool first = pair < end && (pair == begin || keys[pair] / 2 != keys[pair - 1] / 2);
    const unsigned firsts = __ballot_sync(kAllLanes, first);
    if (first)
      f(entries + __popc(firsts & lanes_below(lane)), keys[pair] / 2 - row * args.num_nodes,
        merged(keys, values, pair, end, args.take_union));
    entries += __popc(firsts);
  }
  return entries;
}

// A warp a row: the number of its entries, where its offset will be, and d^(-1/2).
__global__ void __launch_bounds__(kThreads)
    count_entries(const AdjacencyArgs args, const uint64_t* keys, const float* values,
                  const int64_t* bounds, float* scale) {
  const int64_t row = global_warp();
  if (row >= args.num_nodes) return;
  double degree = 0;
  const int64_t entries =
      for_each_entry(args, keys, values, bounds, row,
                     [&](int64_t, int64_t, float a) { degree += fabs(static_cast<double>(a)); });
  degree = warp_sum(degree);
  if (lane_id() == 0) {
    args.row_offsets[row] = entries;
    scale[row] = static_cast<float>(1 / sqrt(degree));  // inf for an empty row: nothing reads it
  }
}

__global__ void __launch_bounds__(kThreads)
    fill_rows(const AdjacencyArgs args, const uint64_t* keys, const float* values,
              const int64_t* bounds, const float* scale) {
  const int64_t row = global_warp();
  if (row >= args.num_nodes) return;
  const int64_t begin = args.row_offsets[row];
  const float own = scale[row];
  for_each_entry(args, keys, values, bounds, row, [&](int64_t place, int64_t column, float a) {
    args.columns[begin + place] = static_cast<int32_t>(column);
    args.values[begin + place] = fabsf(a) * (own * scale[column]);  // no sign, a NaN's neither
  });
}

int bits_of(uint64_t number) {
  int bits = 0;
  for (; number; number >>= 1) ++bits;
  return bits;
}

}  // namespace

cudaError_t adjacency_bytes(const AdjacencyArgs& args, size_t* bytes) {
  Memory memory;
  const cudaError_t error = cut(args, &memory);
  *bytes = memory.bytes;
  return error;
}

cudaError_t adjacency_count(AdjacencyArgs& args, int64_t* nnz, cudaStream_t stream) {
  const int64_t n = args.num_nodes, edges = n * args.size;
  Memory memory;
  cudaError_t error = cut(args, &memory);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(memory.summary, 0, sizeof(Summary), stream);
  if (error != cudaSuccess) return error;
  const auto emit = args.wide_indices ? emit_pairs<int64_t> : emit_pairs<int32_t>;
  error = launch(emit, dim3(blocks_for(edges)), dim3(kThreads), 0, stream, args,
                 memory.pairs.keys[0], memory.pairs.values[0], memory.summary);
  if (error != cudaSuccess) return error;
  uint64_t* const first_half = memory.pairs.keys[0];
  error = sort_pairs(memory.temporary, memory.temporary_bytes, memory.pairs, 2 * edges,
                     bits_of(key_of_none(n)), stream);
  if (error != cudaSuccess) return error;
  args.sorted_half = memory.pairs.keys[0] == first_half ? 0 : 1;
  const uint64_t* keys = memory.pairs.keys[0];
  error = launch(find_rows, dim3(blocks_for(n + 1)), dim3(kThreads), 0, stream, n, 2 * edges, keys,
                 memory.bounds);
  if (error != cudaSuccess) return error;
  error = launch(count_entries, dim3(blocks_for(kWarp * n)), dim3(kThreads), 0, stream, args, keys,
                 static_cast<const float*>(memory.pairs.values[0]),
                 static_cast<const int64_t*>(memory.bounds), memory.scale);
  if (error != cudaSuccess) return error;
  error = offsets_from_sizes(memory.temporary, memory.temporary_bytes, args.row_offsets, n,
                             memory.summary, stream);
  return error == cudaSuccess ? read_nnz(memory.summary, nnz, stream) : error;
}

cudaError_t adjacency_fill(const AdjacencyArgs& args, cudaStream_t stream) {
  Memory memory;
  const cudaError_t error = cut(args, &memory);
  if (error != cudaSuccess) return error;
  return launch(fill_rows, dim3(blocks_for(kWarp * args.num_nodes)), dim3(kThreads), 0, stream,
                args, static_cast<const uint64_t*>(memory.pairs.keys[args.sorted_half]),
                static_cast<const float*>(memory.pairs.values[args.sorted_half]),
                static_cast<const int64_t*>(memory.bounds),
                static_cast<const float*>(memory.scale));
}

}  // namespace nefkern::cuda
