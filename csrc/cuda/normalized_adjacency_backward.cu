// With H the symmetric part of the gradient, s = d^(-1/2) and p_i = sum_j a_ij s_i s_j H_ij / d_i,
// an edge from i to j that a_ij takes the share c of has the gradient
//     c (2 H_ij s_i s_j - p_i - p_j) .
// What competes for a place meets there by a maximum and a count, which no order changes. All sums
// are those of a stored row, by a block, in an order that only the row's length decides: what node
// i gives j, and what j gives i, stands in both rows, so that nothing is added across them.
#include "cuda/launches.h"
#include "cuda/normalized_adjacency_backward.h"
#include "cuda/warp.cuh"
#include "cuda/workspace.h"

namespace nefkern::cuda {
namespace {

// What one row's list says of a stored place (i, j).
struct ListedPlace {
  unsigned weight;  // the bits of the largest that i gives j, 0 if none: it is never negative
  unsigned times;   // that this weight is listed
};

// And what both say.
struct JoinedPlace {
  double entry;     // a_ij
  float symmetric;  // H_ij
  int sharers;      // edges of i's list that a_ij's gradient is shared by; 0 if there are none
};

struct Places {
  ListedPlace* listed;  // [nnz]
  JoinedPlace* joined;  // [nnz]
  int32_t* of_edge;     // [N, k], in the edge's row; kDropped, kNotStored
  double* scale;        // [N], d^(-1/2)
  double* pull;         // [N], p
};

constexpr int32_t kDropped = -1, kNotStored = -2;
constexpr int kThreads = 256;    // of a block
constexpr int kPlacesALane = 8;  // of join_places

// An edge as the gradient sees it: a NaN's gradient is the lower bound's, as clamp has it.
struct ClampedEdge {
  int64_t node;
  float weight;
  bool passed, is_kept;
};

__device__ __forceinline__ ClampedEdge clamped_edge(const AdjacencyBackwardArgs& args,
                                                    int64_t number) {
  const NeighbourLists& lists = args.lists;
  const float given = lists.weights[number];
  ClampedEdge edge;
  edge.node = lists.wide_indices ? static_cast<const int64_t*>(lists.indices)[number]
                                 : static_cast<const int32_t*>(lists.indices)[number];
  edge.passed = given >= lists.clamp_min;
  edge.weight = edge.passed ? given : lists.clamp_min;
  edge.is_kept = edge.node >= 0 && edge.weight > 0;
  return edge;
}

struct RowExtent {
  int64_t begin, end;
};

__device__ __forceinline__ RowExtent extent_of(const AdjacencyBackwardArgs& args, int64_t row) {
  const int64_t begin = args.row_offsets[row], end = args.row_offsets[row + 1];
  if (begin < 0 || begin > end || end > args.nnz) return {0, 0};
  return {begin, end};
}

// Where a row stores a column; its end where it does not.
__device__ __forceinline__ int64_t find(const AdjacencyBackwardArgs& args, const RowExtent& row,
                                        int64_t column) {
  const int64_t place = lower_bound(args.columns, row.begin, row.end, static_cast<int32_t>(column));
  return place < row.end && args.columns[place] == column ? place : row.end;
}

// A warp a row: where its edges are stored, the largest weight of each place, and who has it.
__global__ void __launch_bounds__(kThreads)
    list_places(const AdjacencyBackwardArgs args, const Places places) {
  const int64_t row = global_warp();
  if (row >= args.num_nodes) return;
  const RowExtent extent = extent_of(args, row);
  const int64_t first = row * args.lists.size, last = first + args.lists.size;
  for (int64_t number = first + lane_id(); number < last; number += kWarp) {
    const ClampedEdge edge = clamped_edge(args, number);
    int32_t place = kDropped;
    if (edge.is_kept) {
      const int64_t at = edge.node < args.num_nodes ? find(args, extent, edge.node) : extent.end;
      place = at < extent.end ? static_cast<int32_t>(at - extent.begin) : kNotStored;
      if (place >= 0) atomicMax(&places.listed[at].weight, __float_as_uint(edge.weight));
    }
    places.of_edge[number] = place;
  }
  __syncwarp();  // all of the row's weights are there
  for (int64_t number = first + lane_id(); number < last; number += kWarp) {
    const int32_t place = places.of_edge[number];
    if (place < 0) continue;
    ListedPlace& listed = places.listed[extent.begin + place];
    // Atomic operations write to the L2 cache; the first level's may be older.
    const unsigned largest = *const_cast<const volatile unsigned*>(&listed.weight);
    if (__float_as_uint(clamped_edge(args, number).weight) == largest) atomicAdd(&listed.times, 1u);
  }
}

__device__ __forceinline__ JoinedPlace join(const ListedPlace& own, const ListedPlace& other,
                                            double gradients, bool take_union) {
  const float weight = __uint_as_float(own.weight), mirrored = __uint_as_float(other.weight);
  const auto symmetric = static_cast<float>(0.5 * gradients);
  if (!take_union)
    return {0.5 * (static_cast<double>(weight) + mirrored), symmetric,
            2 * static_cast<int>(own.times)};
  const unsigned rivals = weight == mirrored ? other.times : 0;
  return {weight < mirrored ? mirrored : weight, symmetric,
          weight < mirrored ? 0 : static_cast<int>(own.times + rivals)};
}

// A lane an entry, so that a hub is many warps': its transposed one is found by a search.
__global__ void __launch_bounds__(kThreads)
    join_places(const AdjacencyBackwardArgs args, const Places places) {
  const int64_t begin = global_warp() * kWarp * kPlacesALane;
  if (begin >= args.nnz) return;
  const int64_t last = min(begin + kWarp * kPlacesALane, args.nnz) - 1;
  const auto begin_of = [&](int64_t row) { return args.row_offsets[row]; };
  const int64_t first_row = range_of(args.num_nodes, begin, begin_of);
  const int64_t rows = range_of(args.num_nodes, last, begin_of) + 1;
  for (int64_t place = begin + lane_id(); place <= last; place += kWarp) {
    const int64_t row =
        lower_bound(args.row_offsets, first_row + 1, max(rows, first_row + 1), place + 1) - 1;
    const int64_t column = args.columns[place];
    ListedPlace other{0, 0};
    double gradients = args.gradient[place];
    if (column >= 0 && column < args.num_nodes) {
      const RowExtent extent = extent_of(args, column);
      const int64_t mirror = find(args, extent, row);
      if (mirror < extent.end) {
        other = places.listed[mirror];
        gradients += args.gradient[mirror];
      }
    }
    places.joined[place] = join(places.listed[place], other, gradients, args.take_union);
  }
}

// The sum of a block's threads, in an order that only their numbers decide; in thread 0.
__device__ __forceinline__ double block_sum(double own) {
  struct Parts {
    double of[kThreads / kWarp];
  };
  Parts& parts = block_shared<Parts>();
  own = warp_sum(own);
  if (lane_id() == 0) parts.of[threadIdx.x / kWarp] = own;
  __syncthreads();
  for (int warp = 1; warp < kThreads / kWarp && threadIdx.x == 0; ++warp) own += parts.of[warp];
  return own;
}

// The sum of f(place) over a row's entries, by a block; in thread 0.
template <class F>
__device__ __forceinline__ double row_sum(const RowExtent& row, const F& f) {
  double sum = 0;
#pragma unroll 4
  for (int64_t place = row.begin + threadIdx.x; place < row.end; place += kThreads) sum += f(place);
  return block_sum(sum);
}

__global__ void __launch_bounds__(kThreads)
    find_scales(const AdjacencyBackwardArgs args, const Places places) {
  const int64_t row = blockIdx.x;
  const double degree =
      row_sum(extent_of(args, row), [&](int64_t place) { return places.joined[place].entry; });
  if (threadIdx.x == 0) places.scale[row] = degree > 0 ? 1 / sqrt(degree) : 1;
}

__global__ void __launch_bounds__(kThreads)
    find_pulls(const AdjacencyBackwardArgs args, const Places places) {
  const int64_t row = blockIdx.x;
  const double sum = row_sum(extent_of(args, row), [&](int64_t place) {
    const JoinedPlace joined = places.joined[place];
    const int64_t column = args.columns[place];
    // Where only the pixel graph has an entry the gradient may be anything.
    if (!(joined.entry > 0) || column < 0 || column >= args.num_nodes) return 0.0;
    return joined.entry * places.scale[column] * joined.symmetric;
  });
  const double scale = places.scale[row];
  if (threadIdx.x == 0) places.pull[row] = sum * scale * scale * scale;
}

__global__ void __launch_bounds__(kThreads)
    write_gradients(const AdjacencyBackwardArgs args, const Places places) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (number >= args.num_nodes * args.lists.size) return;
  const int32_t place = places.of_edge[number];
  float found = place == kNotStored ? __uint_as_float(0x7fffffffu) : 0;
  if (place >= 0) {
    const int64_t row = number / args.lists.size, at = extent_of(args, row).begin + place;
    const ClampedEdge edge = clamped_edge(args, number);
    const JoinedPlace joined = places.joined[at];
    const bool wins = __float_as_uint(edge.weight) == places.listed[at].weight;
    if (edge.passed && wins && joined.sharers > 0) {
      const double slope = joined.symmetric * (places.scale[row] * places.scale[edge.node]);
      found = static_cast<float>((2 * slope - places.pull[row] - places.pull[edge.node]) /
                                 joined.sharers);
    }
  }
  args.weights_gradient[number] = found;
}

Places lay_out(Workspace& space, const AdjacencyBackwardArgs& args) {
  Places places;
  places.listed = space.take<ListedPlace>(args.nnz);
  places.joined = space.take<JoinedPlace>(args.nnz);
  places.of_edge = space.take<int32_t>(args.num_nodes * args.lists.size);
  places.scale = space.take<double>(args.num_nodes);
  places.pull = space.take<double>(args.num_nodes);
  return places;
}

}  // namespace

size_t adjacency_backward_bytes(const AdjacencyBackwardArgs& args) {
  Workspace space(nullptr);
  lay_out(space, args);
  return space.bytes();
}

cudaError_t adjacency_backward(const AdjacencyBackwardArgs& args, cudaStream_t stream) {
  if (args.num_nodes < 0 || args.num_nodes >= int64_t{1} << 31) return cudaErrorInvalidValue;
  if (args.num_nodes == 0) return cudaSuccess;
  Workspace space(args.workspace);
  const Places places = lay_out(space, args);
  Launches launch(stream);
  launch.zero(places.listed, args.nnz * sizeof(ListedPlace));
  launch(list_places, tiles(args.num_nodes, kThreads / kWarp), kThreads, 0, args, places);
  launch(join_places, tiles(args.nnz, kThreads * kPlacesALane), kThreads, 0, args, places);
  launch(find_scales, args.num_nodes, kThreads, 0, args, places);
  launch(find_pulls, args.num_nodes, kThreads, 0, args, places);
  launch(write_gradients, tiles(args.num_nodes * args.lists.size, kThreads), kThreads, 0, args,
         places);
  return launch.error();
}

}  // namespace nefkern::cuda
