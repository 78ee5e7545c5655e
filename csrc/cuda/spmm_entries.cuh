// What all of spmm's kernels do: a row's entries times rows of x, a warp's columns at a time.
#pragma once

#include "cuda/half.cuh"
#include "cuda/launches.h"
#include "cuda/spmm.h"
#include "cuda/warp.cuh"

namespace nefkern::cuda {
namespace {

constexpr int kWarps = 8;  // of a block

// One 16-byte load's elements of X as floats.
template <class X>
constexpr int kWidth = 16 / sizeof(X);

__device__ __forceinline__ void unpack(const uint4& words, float (&out)[4], float) {
  out[0] = __uint_as_float(words.x);
  out[1] = __uint_as_float(words.y);
  out[2] = __uint_as_float(words.z);
  out[3] = __uint_as_float(words.w);
}

template <class Half>
__device__ __forceinline__ void unpack(const uint4& words, float (&out)[8], Half) {
  const unsigned word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = to_float(Half{static_cast<uint16_t>(word[i] & 0xffff)});
    out[2 * i + 1] = to_float(Half{static_cast<uint16_t>(word[i] >> 16)});
  }
}

// The extent of a row that the offsets give, whatever they are.
struct Extent {
  int64_t begin, end;
  __device__ __forceinline__ int64_t size() const { return end - begin; }
};

__device__ __forceinline__ Extent extent_of(const SpmmArgs& args, int64_t row) {
  if (row >= args.num_nodes) return {0, 0};
  const int64_t begin = args.row_offsets[row], end = args.row_offsets[row + 1];
  if (begin < 0 || begin > end || end > args.nnz) return {0, 0};
  return {begin, end};
}

// A lane's part of a row of y: kVectors times kWidth columns, a warp's width apart.
template <class X, int kVectors>
struct Columns {
  int64_t first;  // of the first vector
  int step;       // to the next

  __device__ __forceinline__ int64_t of(int vector) const { return first + vector * step; }
};

// A lane's sums for a row of y.
template <class X, int kVectors>
using Sum = float[kVectors][kWidth<X>];

// The sums of a block's warps, to be added up.
template <class X, int kVectors>
using Partials = float[kWarps][kVectors * kWidth<X>][kWarp];

template <class X, int kVectors>
constexpr int64_t kTileColumns = int64_t{kVectors} * kWarp * kWidth<X>;

template <class X, int kVectors>
__device__ __forceinline__ void add_product(float weight, const uint4 (&row)[kVectors],
                                            Sum<X, kVectors>& sum) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    float element[kWidth<X>];
    unpack(row[v], element, X{});
#pragma unroll
    for (int c = 0; c < kWidth<X>; ++c) sum[v][c] = __fmaf_rn(weight, element[c], sum[v][c]);
  }
}

template <class X, bool kAligned>
__device__ __forceinline__ uint4 load(const X* row, int64_t column, int64_t num_columns) {
  if constexpr (kAligned) {
    return column < num_columns ? __ldg(reinterpret_cast<const uint4*>(row + column)) : uint4{};
  } else {
    constexpr int kBits = 8 * sizeof(X), kElementsAWord = 32 / kBits;
    unsigned word[4] = {};
#pragma unroll
    for (int i = 0; i < kWidth<X>; ++i)
      if (column + i < num_columns)
        word[i / kElementsAWord] |= bits_of(row[column + i]) << (i % kElementsAWord * kBits);
    return {word[0], word[1], word[2], word[3]};
  }
}

// Entries whose loads are issued before the first is used; element by element they are many anyway.
template <bool kAligned>
constexpr int kInFlight = kAligned ? 4 : 1;

// Adds the entries [begin, end) to the warp's sums. The lanes form groups that take an entry each:
// a narrow x is read by many groups, a wide one by a single group of 32 lanes.
template <class X, int kVectors, bool kAligned>
__device__ __forceinline__ void add_entries(const SpmmArgs& args, Extent entries,
                                            const Columns<X, kVectors>& columns, int lanes_a_group,
                                            Sum<X, kVectors>& sum) {
  const X* x = static_cast<const X*>(args.x);
  const int lane = lane_id(), groups = kWarp / lanes_a_group, group = lane / lanes_a_group;
  for (int64_t first = entries.begin; first < entries.end; first += kWarp) {
    const bool mine = first + lane < entries.end;
    int node = mine ? __ldg(args.columns + first + lane) : -1;
    if (node >= args.num_nodes) node = -1;
    const float value = mine && node >= 0 ? __ldg(args.values + first + lane) : 0;
    const int count = static_cast<int>(min(entries.end - first, static_cast<int64_t>(kWarp)));
#pragma unroll 1
    for (int done = 0; done < count; done += kInFlight<kAligned> * groups) {
      uint4 loaded[kInFlight<kAligned>][kVectors];
      float weight[kInFlight<kAligned>];
#pragma unroll
      for (int i = 0; i < kInFlight<kAligned>; ++i) {
        // Beyond the chunk's end the lane wraps around, and its entry is none of this step's.
        const int entry = done + i * groups + group;
        const int from = __shfl_sync(kAllLanes, node, entry % kWarp);
        const bool there = entry < count && from >= 0;
        weight[i] = __shfl_sync(kAllLanes, value, entry % kWarp);
        if (!there) weight[i] = 0;
        const X* row = x + (there ? from : 0) * args.x_stride;
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
          loaded[i][v] = there ? load<X, kAligned>(row, columns.of(v), args.num_columns) : uint4{};
      }
#pragma unroll
      for (int i = 0; i < kInFlight<kAligned>; ++i)
        add_product<X, kVectors>(weight[i], loaded[i], sum);
    }
  }
  for (int distance = lanes_a_group; distance < kWarp; distance *= 2)
    for (int v = 0; v < kVectors; ++v)
      for (int c = 0; c < kWidth<X>; ++c)
        sum[v][c] += __shfl_xor_sync(kAllLanes, sum[v][c], distance);
}

// The same for the whole block, an eighth of the entries a warp: the sum of all, in warp 0.
template <class X, int kVectors, bool kAligned>
__device__ __forceinline__ void add_entries_by_block(const SpmmArgs& args, Extent entries,
                                                     const Columns<X, kVectors>& columns,
                                                     int lanes_a_group,
                                                     Partials<X, kVectors>& partial,
                                                     Sum<X, kVectors>& sum) {
  const int lane = lane_id(), warp = threadIdx.x / kWarp;
  const int64_t share = (entries.size() + kWarps - 1) / kWarps;
  const int64_t begin = min(entries.begin + warp * share, entries.end);
  add_entries<X, kVectors, kAligned>(args, {begin, min(begin + share, entries.end)}, columns,
                                     lanes_a_group, sum);
  for (int v = 0; v < kVectors; ++v)
    for (int c = 0; c < kWidth<X>; ++c) partial[warp][v * kWidth<X> + c][lane] = sum[v][c];
  __syncthreads();
  if (warp == 0)
    for (int other = 1; other < kWarps; ++other)
      for (int v = 0; v < kVectors; ++v)
        for (int c = 0; c < kWidth<X>; ++c) sum[v][c] += partial[other][v * kWidth<X> + c][lane];
  __syncthreads();
}

template <class X, class Y, int kVectors, bool kAligned>
__device__ __forceinline__ void store_row(const SpmmArgs& args, Y* y,
                                          const Columns<X, kVectors>& columns,
                                          const Sum<X, kVectors>& sum) {
  struct alignas(16) Packed {
    Y element[kWidth<X>];
  };
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t column = columns.of(v);
    if (kAligned) {
      Packed packed;
      for (int c = 0; c < kWidth<X>; ++c) packed.element[c] = from_float<Y>(sum[v][c]);
      if (column < args.num_columns) *reinterpret_cast<Packed*>(y + column) = packed;
    } else {
      for (int c = 0; c < kWidth<X>; ++c)
        if (column + c < args.num_columns) y[column + c] = from_float<Y>(sum[v][c]);
    }
  }
}

template <class Y>
__device__ __forceinline__ Y* row_of_y(const SpmmArgs& args, int64_t row) {
  return static_cast<Y*>(args.y) + row * args.num_columns;
}

}  // namespace
}  // namespace nefkern::cuda
