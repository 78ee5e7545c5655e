// All values of a row, in float32: the baseline, and what redoes the rows that estimates leave
// open.
#pragma once

#include "cuda/knn_select.cuh"

namespace nefkern::cuda {

// ---- few channels: value by value ----

constexpr int64_t kDirectChannels = 16;  // up to here
static_assert(kDirectChannels <= kSumChannels);

// A group of warps a row. Rows are so short that the candidates' come from the first-level cache.
template <KnnMetric kMetric, class Selector>
__global__ void __launch_bounds__(kSelectThreads, Selector::kMinBlocks)
    direct_rows(Rows rows, bool include_self, Output out) {
  const int64_t i = int64_t{blockIdx.x} * Selector::kRows + Selector::Group::in_block();
  if (i >= rows.queries) return;
  const int64_t begin = rows.begin[i];
  const float unscale = unscale_of<kMetric>(rows);
  const auto order = [&](int64_t at) {
    const int64_t j = begin + at;
    if (!rows.present[j] || (j == i && !include_self)) return kNoOrder;
    return order_of(pair_value<kMetric>(rows, i, j, unscale));
  };
  const int64_t total = rows.present[i] ? rows.end[i] - begin : 0;
  write_lowest<kMetric, Selector>(out, i, total, begin, order);
}

// ---- many channels: a block of rows' scores by tiles, then a selection ----

// Rows [first, last), or, of a list whose length the device knows, entries [first, min(last, it)).
struct RowBlock {
  const int* list;   // null: the rows themselves
  const int* count;  // of the list
  int64_t first, last;

  __device__ int64_t size() const {
    if (!list) return last - first;
    return min(last, static_cast<int64_t>(*count)) - first;
  }
  __device__ int64_t row(int64_t r) const { return list ? list[first + r] : first + r; }
};

constexpr float kNoScore = std::numeric_limits<float>::quiet_NaN();  // of what is no candidate
constexpr int kTile = 128;                                           // rows of a tile
constexpr int kTileThreads = 256;
constexpr int kExactColumns = 64;  // of a tile here
constexpr int kExactThreads = 128;
constexpr int kExactDepth = 16;
constexpr int kEach = 8;  // a thread has 8 x 8 pairs
static_assert(kSumChannels % kExactDepth == 0);

// Channels first, so that a thread reads four rows at once; the padding spreads the banks.
template <int kRows>
using ExactTile = float[kExactDepth][kRows + 4];

struct ExactTiles {
  alignas(16) ExactTile<kTile> a;
  alignas(16) ExactTile<kExactColumns> b;
};

// Brings kExactDepth channels of kRows rows to shared memory. Each thread has four of every 32nd
// row, the first of which is threadIdx.x / 4; null: zeros.
template <int kRows>
__device__ __forceinline__ void load_tile(ExactTile<kRows>& tile,
                                          const float* const (&rows)[kRows / 32], int64_t c) {
  const int row = threadIdx.x / 4, piece = threadIdx.x % 4 * 4;
#pragma unroll
  for (int h = 0; h < kRows / 32; ++h) {
    const float4 part =
        rows[h] ? *reinterpret_cast<const float4*>(rows[h] + c + piece) : make_float4(0, 0, 0, 0);
    tile[piece][row + 32 * h] = part.x;
    tile[piece + 1][row + 32 * h] = part.y;
    tile[piece + 2][row + 32 * h] = part.z;
    tile[piece + 3][row + 32 * h] = part.w;
  }
}

// Eight entries of a tile's channel: four from `at` on, and four half a tile further on.
template <int kRows>
__device__ __forceinline__ void read_eight(float (&to)[kEach], const float (&channel)[kRows + 4],
                                           int at) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float4 four = *reinterpret_cast<const float4*>(channel + at + kRows / 2 * h);
    to[4 * h] = four.x;
    to[4 * h + 1] = four.y;
    to[4 * h + 2] = four.z;
    to[4 * h + 3] = four.w;
  }
}

// kExactDepth more channels of a thread's chains.
template <KnnMetric kMetric>
__device__ __forceinline__ void add_tiles(float (&chain)[kEach][kEach], const ExactTiles& tiles,
                                          int ty, int tx) {
#pragma unroll 2
  for (int s = 0; s < kExactDepth; ++s) {
    float x[kEach], y[kEach];
    read_eight<kTile>(x, tiles.a[s], ty);
    read_eight<kExactColumns>(y, tiles.b[s], tx);
#pragma unroll
    for (int p = 0; p < kEach; ++p)
#pragma unroll
      for (int q = 0; q < kEach; ++q) chain[p][q] = add_channel<kMetric>(chain[p][q], x[p], y[q]);
  }
}

// Writes scores[at .. at + 4), of which those inside [0, length) exist; one store where it can be.
__device__ __forceinline__ void write_four(float* scores, int64_t at, int64_t length,
                                           const float (&value)[4]) {
  float* to = scores + at;
  if (at >= 0 && at + 4 <= length && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    *reinterpret_cast<float4*>(to) = make_float4(value[0], value[1], value[2], value[3]);
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (at + e >= 0 && at + e < length) to[e] = value[e];
}

// One tile of scores[r][j - begin of row r], the values of the block's rows with their segments'
// rows, or kSmall; NaN for what is no candidate. Block (x, y): rows from 128 y on; columns from 64
// x on, counted from the first of the first row's candidates.
template <KnnMetric kMetric>
__global__ void __launch_bounds__(kExactThreads, 2)
    exact_tile(Rows rows, RowBlock block, int64_t column_tiles, bool include_self, float* scores,
               int64_t width) {
  const int64_t r0 = blockIdx.x / column_tiles * kTile, size = block.size();
  if (r0 >= size) return;
  const int64_t last_row = block.row(min(r0 + kTile, size) - 1);
  const int64_t j0 = rows.begin[block.row(r0)] + blockIdx.x % column_tiles * kExactColumns;
  if (j0 >= rows.end[last_row]) return;

  ExactTiles& tiles = block_shared<ExactTiles>();
  const float* a_rows[kTile / 32];
  const float* b_rows[kExactColumns / 32];
#pragma unroll
  for (int h = 0; h < kTile / 32; ++h) {
    const int64_t r = r0 + threadIdx.x / 4 + 32 * h;
    a_rows[h] = r < size ? rows.values + block.row(r) * rows.depth : nullptr;
  }
#pragma unroll
  for (int h = 0; h < kExactColumns / 32; ++h) {
    const int64_t j = j0 + threadIdx.x / 4 + 32 * h;
    b_rows[h] = j < rows.n ? rows.values + j * rows.depth : nullptr;
  }
  const int ty = threadIdx.x / 8 * 4, tx = threadIdx.x % 8 * 4;
  float total[kEach][kEach] = {};
  for (int64_t c = 0; c < rows.depth; c += kSumChannels) {
    float chain[kEach][kEach] = {};
    // One stage: while a block waits for its loads, the processor's others multiply.
#pragma unroll 1
    for (int part = 0; part < kSumChannels; part += kExactDepth) {
      load_tile<kTile>(tiles.a, a_rows, c + part);
      load_tile<kExactColumns>(tiles.b, b_rows, c + part);
      __syncthreads();
      add_tiles<kMetric>(chain, tiles, ty, tx);
      __syncthreads();
    }
#pragma unroll
    for (int p = 0; p < kEach; ++p)
#pragma unroll
      for (int q = 0; q < kEach; ++q) total[p][q] = __fadd_rn(total[p][q], chain[p][q]);
  }

  const float unscale = unscale_of<kMetric>(rows);
#pragma unroll
  for (int p = 0; p < kEach; ++p) {
    const int64_t r = r0 + ty + p % 4 + p / 4 * 64;
    if (r >= size) continue;
    const int64_t i = block.row(r), begin = rows.begin[i], length = rows.end[i] - begin;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t j = j0 + tx + kExactColumns / 2 * h;
      float value[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool candidate = j + e < rows.n && rows.present[i] && rows.present[j + e] &&
                               (include_self || i != j + e);
        value[e] =
            candidate ? value_of<kMetric>(rows, total[p][4 * h + e], i, j + e, unscale) : kNoScore;
      }
      write_four(scores + r * width, j - begin, length, value);
    }
  }
}

// A group of warps a row of the block of rows: its k best by their scores.
template <KnnMetric kMetric, class Selector>
__global__ void __launch_bounds__(kSelectThreads, Selector::kMinBlocks)
    select_rows(Rows rows, RowBlock block, const float* scores, int64_t width, Output out) {
  const int64_t r = int64_t{blockIdx.x} * Selector::kRows + Selector::Group::in_block();
  if (r >= block.size()) return;
  const int64_t i = block.row(r), begin = rows.begin[i];
  const float* row = scores + r * width;
  const auto order = [&](int64_t at) {
    float score = row[at];
    if (score != score) return kNoOrder;
    if (kMetric == KnnMetric::kEuclidean && score > 0) score = -small_distance(rows, i, begin + at);
    return order_of(score);
  };
  write_lowest<kMetric, Selector>(out, i, rows.end[i] - begin, begin, order);
}

}  // namespace nefkern::cuda
