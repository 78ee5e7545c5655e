// A listed edge, and what becomes of those that share a place of the matrix: the same whichever way
// they were brought together.
#pragma once

#include "cuda/neighbour_lists.h"
#include "cuda/two_steps.cuh"

namespace nefkern::cuda {

// d^(-1/2) in either graph, [N] each.
struct Scales {
  float* features;
  float* pixels;  // null where there is one graph
};

struct Edge {
  int64_t node;
  float weight;
  bool is_kept, is_invalid;
};

// The largest weights of the edges that share a place; 0 where there are none.
struct Merged {
  float listed, mirrored, pixels;
};

namespace {

__device__ __forceinline__ Edge edge_of(const NeighbourLists& lists, int64_t number,
                                        int64_t num_nodes) {
  Edge edge;
  edge.node = lists.wide_indices ? static_cast<const int64_t*>(lists.indices)[number]
                                 : static_cast<const int32_t*>(lists.indices)[number];
  edge.weight = lists.weights ? lists.weights[number] : 1.0f;
  if (edge.weight < lists.clamp_min) edge.weight = lists.clamp_min;
  edge.is_invalid = edge.node < -1 || edge.node >= num_nodes;
  // "Not <=" rather than ">": a NaN stays visible.
  edge.is_kept = edge.node >= 0 && !edge.is_invalid && !(edge.weight <= 0);
  return edge;
}

// An entry of (A + A^T) / 2. In double no sum overflows and no half is lost. No sign, a NaN's
// neither.
__device__ __forceinline__ double symmetrized(const Merged& entry) {
  return fabs(0.5 * (static_cast<double>(entry.listed) + static_cast<double>(entry.mirrored)));
}

__device__ __forceinline__ float larger(float a, float b) { return b > a || b != b ? b : a; }

// The same, or an entry of the logical or: max(A, A^T).
__device__ __forceinline__ double symmetrized(const Merged& entry, bool take_union) {
  return take_union ? fabsf(larger(entry.listed, entry.mirrored)) : symmetrized(entry);
}

// a d_i^(-1/2) d_j^(-1/2). The product of two scales has no place in float32 where weights are far
// from 1; in double it is exact, and the same for (j, i).
__device__ __forceinline__ float normalized(double a, float scale_i, float scale_j) {
  return static_cast<float>(a * (static_cast<double>(scale_i) * scale_j));
}

// d^(-1/2) of a row whose entries add up to `degree`; inf for an empty row: nothing reads it.
__device__ __forceinline__ float inverse_root(double degree) {
  return static_cast<float>(1 / sqrt(degree));
}

}  // namespace
}  // namespace nefkern::cuda
