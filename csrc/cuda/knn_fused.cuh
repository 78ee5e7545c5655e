// Estimates on tensor cores choose the candidates; only their values are computed.
//
// For a chunk of rows of one segment:
// 1. estimate_tiles<kSample>: their scores with a sample of the segment's rows;
// 2. set_thresholds: a score that, by the sample, somewhat more than k rows reach, for every row;
// 3. estimate_tiles: the scores with all rows, in tiles that stay in registers. Each is computed
//    once and offered to both its rows; those that reach a row's threshold become its candidates;
// 4. rerank_rows (knn_rerank.cuh): what the margin (knn_rows.cuh) leaves of them gets its values,
//    and is sorted.
// A threshold is a guess. Step 4 sees whether it was low enough (the bound of the margin is not
// below it) and not too low (the candidates fit their buffer); where not, the row goes on a list,
// and all its values are computed (knn_exact.cuh).
//
// The order in which candidates arrive varies, the results don't: a bound that held for one order
// of the same set holds for all, and the sort has the last word.
#pragma once

#include "cuda/knn_exact.cuh"

namespace nefkern::cuda {

// Rows [first, last), whose candidates are rows [begin, end): those of a database, all of them
// further on, or their own segment's. Then `first - begin` is a multiple of kTile.
struct Chunk {
  int64_t begin, end, first, last;
};

struct Candidates {
  float* threshold;  // [rows of the chunk]
  int* count;        // [rows]: may exceed `capacity`, beyond which nothing is kept
  float* score;      // [rows, capacity], in no order
  int* index;        // [rows, capacity]
  int64_t capacity;
  int* redo;        // [rows]: those left to the exact kernels
  int* redo_count;  // [1]
};

// A sample of the segment: one row from each of `size` equal parts, where in it by a hash, so that
// no period of the input matters.
struct Sample {
  int64_t begin, length, size;

  __device__ __forceinline__ int64_t row(int64_t s) const {
    unsigned hash = static_cast<unsigned>(s) * 0x9e3779b1u;
    hash = (hash ^ hash >> 15) * 0x85ebca77u;
    hash ^= hash >> 13;
    return begin + (s * length + hash % static_cast<unsigned>(length)) / size;
  }
};

// ---- tiles of estimates ----

constexpr int kStages = 3;
constexpr int kStageDepth = 32;                // channels: 64 bytes of a row
constexpr int kPieces = kStageDepth * 2 / 16;  // of 16 bytes
constexpr int kWarpRows = 64, kWarpColumns = 32;
constexpr int kRowFragments = kWarpRows / 16, kColumnFragments = kWarpColumns / 8;
constexpr int kThreadRows = 2 * kRowFragments, kThreadColumns = 2 * kColumnFragments;

// A piece's place is exchanged with others of its row by the row's number: eight rows' pieces of
// the same channels, which ldmatrix reads at once, then lie in different banks.
struct Stage {
  alignas(128) __half a[kTile * kStageDepth];
  alignas(128) __half b[kTile * kStageDepth];

  static __device__ __forceinline__ int place(int row, int piece) {
    return row * kStageDepth + (piece ^ (row >> 1 & 3)) * 8;
  }
};

// A candidate found in a tile: for the row, or, mirrored, for the column.
struct Found {
  float score;
  unsigned pair;  // mirrored << 16 | row << 8 | column, in the tile
};

constexpr size_t kTileBytes = kStages * sizeof(Stage);
constexpr int kListed = kTileBytes / sizeof(Found);  // the list takes the place of the stages

struct FoundCount {
  int found;
};

__device__ __forceinline__ void add_candidate(const Candidates& candidates, int64_t r, int64_t j,
                                              float score) {
  const int slot = atomicAdd(&candidates.count[r], 1);
  if (slot >= candidates.capacity) return;
  candidates.score[r * candidates.capacity + slot] = score;
  candidates.index[r * candidates.capacity + slot] = static_cast<int>(j);
}

// What one warp has of the tile's scores: <p_i, p_j> of 64 rows with 32 columns.
struct Products {
  float sum[kRowFragments][kColumnFragments][4];

  __device__ __forceinline__ void multiply(const Stage& stage, int warp_row, int warp_column) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int k = 0; k < kStageDepth / 16; ++k) {
      uint32_t a[kRowFragments][4], b[kColumnFragments / 2][4];
#pragma unroll
      for (int m = 0; m < kRowFragments; ++m)
        ldmatrix_x4(a[m], stage.a + Stage::place(warp_row + 16 * m + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int n = 0; n < kColumnFragments / 2; ++n)
        ldmatrix_x4(b[n], stage.b + Stage::place(warp_column + 16 * n + lane / 16 * 8 + lane % 8,
                                                 2 * k + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < kRowFragments; ++m)
#pragma unroll
        for (int n = 0; n < kColumnFragments; ++n) {
          const uint32_t column[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
          mma_m16n8k16_f16(sum[m][n], a[m], column, sum[m][n]);
        }
    }
  }
};

// Where the p-th of a thread's rows, the q-th of its columns is in its warp's part.
__device__ __forceinline__ int fragment_row(int p) {
  return p / 2 * 16 + p % 2 * 8 + threadIdx.x % kWarp / 4;
}
__device__ __forceinline__ int fragment_column(int q) {
  return q / 2 * 8 + threadIdx.x % 4 * 2 + q % 2;
}

// Two pieces of each operand, on their way to a stage: of rows threadIdx.x / 4 and 64 further on.
struct TileLoads {
  const __half* a[2];  // null: zeros
  const __half* b[2];
  const __half* anywhere;

  __device__ __forceinline__ void start(Stage& stage, int64_t c) const {
    const int piece = threadIdx.x % kPieces, row = threadIdx.x / kPieces;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int at = Stage::place(row + 64 * h, piece);
      cp_async_16(stage.a + at, a[h] ? a[h] + c + piece * 8 : anywhere, a[h] != nullptr);
      cp_async_16(stage.b + at, b[h] ? b[h] + c + piece * 8 : anywhere, b[h] != nullptr);
    }
  }
};

// The products of all channels, through a ring of stages.
__device__ __forceinline__ void multiply_tile(Products& products, Stage* stages,
                                              const TileLoads& loads, int64_t depth, int warp_row,
                                              int warp_column) {
  const int64_t steps = depth / kStageDepth;
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) loads.start(stages[s], s * kStageDepth);
    cp_async_commit();
  }
  int now = 0, next = kStages - 1;
  for (int64_t s = 0; s < steps; ++s) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this stage has arrived for all, and all are done with the one before it
    if (s + kStages - 1 < steps) loads.start(stages[next], (s + kStages - 1) * kStageDepth);
    cp_async_commit();
    products.multiply(stages[now], warp_row, warp_column);
    now = now + 1 == kStages ? 0 : now + 1;
    next = next + 1 == kStages ? 0 : next + 1;
  }
  cp_async_wait<0>();
  __syncthreads();
}

// The order of tiles: squares of side x side of them, one after the other, so that the tiles under
// way at a time share the rows that they read. Where `mirrored`, `rows` of the columns, from
// `first_own` on, are the tiles of the rows themselves, and of two transposed tiles only one is
// wanted. Columns are counted from `first_own` on, and those before it come last: row tile r then
// has columns r, ..., columns - 1.
struct TileOrder {
  unsigned rows, columns;  // tiles
  unsigned first_own;
  unsigned side;
  bool mirrored;

  // Squares, and the rows of one.
  __host__ __device__ unsigned wide() const { return (columns + side - 1) / side; }
  __host__ __device__ unsigned high() const { return (rows + side - 1) / side; }
  __host__ __device__ unsigned height() const { return rows < side ? rows : side; }
  // Squares before the s-th row of them.
  template <class Count>
  __host__ __device__ Count before(Count s) const {
    return mirrored ? s * wide() - s * (s - 1) / 2 : s * wide();
  }
  // Some blocks, at the edges, have no tile.
  __host__ int64_t blocks() const { return before<int64_t>(high()) * side * height(); }

  // The tile of a block, one of fewer than 2^31; whether it has one.
  __host__ __device__ bool find(unsigned block, unsigned& row, unsigned& column) const {
    const unsigned square = block / (side * height()), inside = block % (side * height());
    unsigned low = 0, end = high();
    while (end - low > 1) {
      const unsigned middle = (low + end) / 2;
      if (before(middle) <= square) {
        low = middle;
      } else {
        end = middle;
      }
    }
    row = low * side + inside % height();
    column = (square - before(low) + (mirrored ? low : 0)) * side + inside / height();
    if (row >= rows || column >= columns || (mirrored && column < row)) return false;
    column += first_own;
    if (column >= columns) column -= columns;
    return true;
  }
};

struct TileTask {
  const __half* packed;  // p
  const float* offset;   // u
  int64_t depth;
  Chunk chunk;
  bool include_self;
  Sample sample;
  TileOrder order;
};

// The scores of a thread's part of a tile, row by row.
struct TileScores {
  const Products& products;
  const TileTask& task;
  int64_t first_row;        // of the warp's part
  float v[kThreadColumns];  // the columns' offsets; -inf past the end

  __device__ __forceinline__ int64_t row(int p) const { return first_row + fragment_row(p); }

  // f(p, scores of the thread's p-th row with its columns); p is a constant once unrolled.
  template <class F>
  __device__ __forceinline__ void for_each_row(const F& f) const {
#pragma unroll
    for (int p = 0; p < kThreadRows; ++p) {
      const float u = row(p) < task.chunk.last ? task.offset[row(p)] : -kNothing;
      float score[kThreadColumns];
#pragma unroll
      for (int q = 0; q < kThreadColumns; ++q)
        score[q] = products.sum[p / 2][q / 2][p % 2 * 2 + q % 2] + (u + v[q]);
      f(p, score);
    }
  }
};

// Row of the column-th column of a tile, or -1.
template <bool kSample>
__device__ __forceinline__ int64_t column_row(const TileTask& task, int64_t column_tile,
                                              int column) {
  const int64_t at = column_tile * kTile + column;
  if constexpr (kSample) {
    return at < task.sample.size ? task.sample.row(at) : -1;
  } else {
    return task.chunk.begin + at < task.chunk.end ? task.chunk.begin + at : -1;
  }
}

// Writes a tile of sample_scores [rows of the chunk, sample].
__device__ __forceinline__ void write_sample(const TileScores& scores, int64_t first_column,
                                             float* sample_scores) {
  const TileTask& task = scores.task;
  scores.for_each_row([&](int p, const float (&score)[kThreadColumns]) {
    const int64_t i = scores.row(p);
    if (i >= task.chunk.last) return;
#pragma unroll
    for (int q = 0; q < kThreadColumns; ++q) {
      const int64_t s = first_column + fragment_column(q);
      if (s >= task.sample.size) continue;
      const bool self = !task.include_self && task.sample.row(s) == i;
      sample_scores[(i - task.chunk.first) * task.sample.size + s] = self ? -kNothing : score[q];
    }
  });
}

// The candidates of a tile whose first row is i0 and first column j0. One pass over the scores
// counts, so that a warp takes its places in the list at once, the other writes. From the list on,
// threads have equal shares of what was found, and their atomics are under way together.
__device__ __forceinline__ void collect(const TileScores& scores, int64_t i0, int64_t j0,
                                        int warp_row, int warp_column, Found* list, int& found,
                                        const Candidates& candidates) {
  const Chunk& chunk = scores.task.chunk;
  const bool mirrored = scores.task.order.mirrored && j0 > i0 && j0 < chunk.last;
  float for_column[kThreadColumns];  // thresholds
#pragma unroll
  for (int q = 0; q < kThreadColumns; ++q) {
    const int64_t j = j0 + warp_column + fragment_column(q);
    for_column[q] = mirrored && j < chunk.last ? candidates.threshold[j - chunk.first] : kNothing;
  }
  // Column less row, in the warp's part, of a row's pair with itself.
  const int self = i0 == j0 && !scores.task.include_self ? warp_row - warp_column : kTile;
  // f(p, q, score, whether it is a candidate of the row, of the column)
  const auto for_each = [&](const auto& f) {
    scores.for_each_row([&](int p, const float (&score)[kThreadColumns]) {
      const int64_t i = scores.row(p);
      const float for_row = i < chunk.last ? candidates.threshold[i - chunk.first] : kNothing;
#pragma unroll
      for (int q = 0; q < kThreadColumns; ++q) {
        const bool other = fragment_column(q) - fragment_row(p) != self;
        f(p, q, score[q], score[q] >= for_row && other, score[q] >= for_column[q]);
      }
    });
  };

  int mine = 0;
  for_each([&](int, int, float, bool row, bool column) { mine += row + column; });
  int place = mine;  // inclusive sums over the warp
  const int lane = threadIdx.x % kWarp;
  for (int d = 1; d < kWarp; d *= 2) {
    const int before = __shfl_up_sync(kAllLanes, place, d);
    if (lane >= d) place += before;
  }
  int base = 0;
  if (lane == kWarp - 1) base = atomicAdd(&found, place);
  place += __shfl_sync(kAllLanes, base, kWarp - 1) - mine;

  const auto offer = [&](const Found& one) {
    const int64_t i = i0 + (one.pair >> 8 & 0xff), j = j0 + (one.pair & 0xff);
    if (one.pair >> 16) {
      add_candidate(candidates, j - chunk.first, i, one.score);
    } else {
      add_candidate(candidates, i - chunk.first, j, one.score);
    }
  };
  __syncthreads();  // all warps have their places
  const int total = found;
  for (int first = 0; first < total; first += kListed) {  // once, but for tiles of near copies
    int at = place - first;
    const auto put = [&](const Found& one) {
      if (at >= 0 && at < kListed) list[at] = one;
      ++at;
    };
    if (mine > 0)
      for_each([&](int p, int q, float score, bool row, bool column) {
        const unsigned pair =
            (warp_row + fragment_row(p)) << 8 | (warp_column + fragment_column(q));
        if (row) put({score, pair});
        if (column) put({score, 1u << 16 | pair});
      });
    __syncthreads();
    for (int l = threadIdx.x; l < min(total - first, kListed); l += kTileThreads) offer(list[l]);
    __syncthreads();
  }
}

// One tile of estimates: rows of the chunk with the segment's rows, or with its sample.
template <bool kSample>
__global__ void __launch_bounds__(kTileThreads, 2)
    estimate_tiles(TileTask task, float* sample_scores, Candidates candidates) {
  const Chunk& chunk = task.chunk;
  unsigned row_tile, column_tile;
  if (!task.order.find(blockIdx.x, row_tile, column_tile)) return;
  const int64_t i0 = chunk.first + int64_t{row_tile} * kTile;
  const int64_t j0 = chunk.begin + int64_t{column_tile} * kTile;

  TileLoads loads;
  loads.anywhere = task.packed;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = threadIdx.x / kPieces + 64 * h;
    const int64_t j = column_row<kSample>(task, column_tile, row);
    loads.a[h] = i0 + row < chunk.last ? task.packed + (i0 + row) * task.depth : nullptr;
    loads.b[h] = j >= 0 ? task.packed + j * task.depth : nullptr;
  }
  Stage* stages = dynamic_shared<Stage>();
  int& found = block_shared<FoundCount>().found;
  if (threadIdx.x == 0) found = 0;
  const int warp = threadIdx.x / kWarp;
  const int warp_row = warp % 2 * kWarpRows, warp_column = warp / 2 * kWarpColumns;
  Products products = {};
  multiply_tile(products, stages, loads, task.depth, warp_row, warp_column);

  TileScores scores{products, task, i0 + warp_row, {}};
#pragma unroll
  for (int q = 0; q < kThreadColumns; ++q) {
    const int64_t j = column_row<kSample>(task, column_tile, warp_column + fragment_column(q));
    scores.v[q] = j >= 0 ? task.offset[j] : -kNothing;
  }
  if constexpr (kSample) {
    write_sample(scores, int64_t{column_tile} * kTile + warp_column, sample_scores);
  } else {
    collect(scores, i0, j0, warp_row, warp_column, reinterpret_cast<Found*>(stages), found,
            candidates);
  }
}

// ---- thresholds ----

// A group of warps a row of the chunk: the `rank`-th best of its sample's scores, less twice the
// margin.
template <KnnMetric kMetric, class Selector>
__global__ void __launch_bounds__(kSelectThreads, Selector::kMinBlocks)
    set_thresholds(Rows rows, Estimates estimates, Chunk chunk, const float* sample_scores,
                   int64_t sample_size, int rank, Candidates candidates) {
  const int64_t r = int64_t{blockIdx.x} * Selector::kRows + Selector::Group::in_block();
  const int64_t i = chunk.first + r;
  if (i >= chunk.last) return;
  const float* scores = sample_scores + r * sample_size;
  Selector selector;
  const auto order = [&](int64_t s) {
    return scores[s] > -kNothing ? order_of(scores[s]) : kNoOrder;
  };
  const int found = selector.lowest(rank, 0, sample_size, 0, order);
  if (Selector::Group::thread() != 0) return;
  float threshold = kAnything;
  if (found == rank)
    threshold =
        margin_of<kMetric>(rows, estimates, i).threshold_from(key_value(selector.keys()[rank - 1]));
  candidates.threshold[r] = rows.present[i] ? threshold : kNothing;
  candidates.count[r] = 0;
}

}  // namespace nefkern::cuda
