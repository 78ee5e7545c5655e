// All values of a row, in float32: the baseline, and what redoes the rows that estimates leave
// open.
#pragma once

#include "cuda/knn_select.cuh"

namespace nefkern::cuda {

// ---- few channels: value by value ----

constexpr int64_t kDirectChannels = 16;  // up to here

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
constexpr int kTile = 128;                                           // rows and columns of a tile
constexpr int kTileThreads = 256;
constexpr int kTileDepth = 16;
constexpr int kEach = 8;  // a thread has 8 x 8 pairs

// Channels first, so that a thread reads four rows at once; the padding spreads the banks.
struct ExactTiles {
  alignas(16) float a[kTileDepth][kTile + 4];
  alignas(16) float b[kTileDepth][kTile + 4];
};

// Brings kTileDepth channels of a tile's rows to shared memory. Each thread has four of two rows,
// 64 apart: row threadIdx.x / 4 is the first; null: zeros.
__device__ __forceinline__ void load_tile(float (&tile)[kTileDepth][kTile + 4],
                                          const float* const (&rows)[2], int64_t c) {
  const int row = threadIdx.x / 4, piece = threadIdx.x % 4 * 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float4 part =
        rows[h] ? *reinterpret_cast<const float4*>(rows[h] + c + piece) : make_float4(0, 0, 0, 0);
    tile[piece][row + 64 * h] = part.x;
    tile[piece + 1][row + 64 * h] = part.y;
    tile[piece + 2][row + 64 * h] = part.z;
    tile[piece + 3][row + 64 * h] = part.w;
  }
}

// Eight entries of a tile's channel: four from `at` on, and four 64 further on.
__device__ __forceinline__ void read_eight(float (&to)[kEach], const float* channel, int at) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float4 four = *reinterpret_cast<const float4*>(channel + at + 64 * h);
    to[4 * h] = four.x;
    to[4 * h + 1] = four.y;
    to[4 * h + 2] = four.z;
    to[4 * h + 3] = four.w;
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
// rows, or kSmall; NaN for what is no candidate. Block (x, y): rows from 128 y on; columns from 128
// x on, counted from the first of the first row's candidates.
template <KnnMetric kMetric>
__global__ void __launch_bounds__(kTileThreads, 2)
    exact_tile(Rows rows, RowBlock block, int64_t column_tiles, bool include_self, float* scores,
               int64_t width) {
  const int64_t r0 = blockIdx.x / column_tiles * kTile, size = block.size();
  if (r0 >= size) return;
  const int64_t last_row = block.row(min(r0 + kTile, size) - 1);
  const int64_t j0 = rows.begin[block.row(r0)] + blockIdx.x % column_tiles * kTile;
  if (j0 >= rows.end[last_row]) return;

  ExactTiles& tiles = block_shared<ExactTiles>();
  const float* a_rows[2];
  const float* b_rows[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t r = r0 + threadIdx.x / 4 + 64 * h, j = j0 + threadIdx.x / 4 + 64 * h;
    a_rows[h] = r < size ? rows.values + block.row(r) * rows.depth : nullptr;
    b_rows[h] = j < rows.n ? rows.values + j * rows.depth : nullptr;
  }
  const int ty = threadIdx.x / 16 * 4, tx = threadIdx.x % 16 * 4;
  float total[kEach][kEach] = {};
  // One stage: while a block waits for its loads, the processor's other block multiplies.
  for (int64_t c = 0; c < rows.depth; c += kTileDepth) {
    load_tile(tiles.a, a_rows, c);
    load_tile(tiles.b, b_rows, c);
    __syncthreads();
#pragma unroll 2
    for (int s = 0; s < kTileDepth; ++s) {
      float x[kEach], y[kEach];
      read_eight(x, tiles.a[s], ty);
      read_eight(y, tiles.b[s], tx);
#pragma unroll
      for (int p = 0; p < kEach; ++p)
#pragma unroll
        for (int q = 0; q < kEach; ++q) total[p][q] = add_channel<kMetric>(total[p][q], x[p], y[q]);
    }
    __syncthreads();
  }

  const float unscale = unscale_of<kMetric>(rows);
#pragma unroll
  for (int p = 0; p < kEach; ++p) {
    const int64_t r = r0 + ty + p % 4 + p / 4 * 64;
    if (r >= size) continue;
    const int64_t i = block.row(r), begin = rows.begin[i], length = rows.end[i] - begin;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t j = j0 + tx + 64 * h;
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
